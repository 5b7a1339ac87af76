// Package tokentest has a SoftHSM token for all tests of a package.
package tokentest

import (
	"context"
	"fmt"
	"os"

	"github.com/orgkeys/orgkeys/internal/hsm"
)

// Run makes a new token, which *token is while run runs. A process has one, so TestMain
// calls this, and exits with what it returns.
func Run(token **hsm.Token, run func() int) int {
	dir, err := os.MkdirTemp("", "orgkeys-test-")
	if err == nil {
		defer os.RemoveAll(dir)
		var cfg hsm.Config
		if cfg, _, err = hsm.InitSoftHSM(dir); err == nil {
			cfg.CreateSealingKey = true
			*token, err = hsm.Open(context.Background(), cfg)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer (*token).Close()
	return run()
}
