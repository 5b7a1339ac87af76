// Command nocgo prints why a token cannot be opened by a binary without cgo.
package main

import (
	"context"
	"fmt"

	"github.com/orgkeys/orgkeys/internal/hsm"
	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// A command that offers every back end compiles without cgo too.
var (
	_ orgkey.Keystore = (*hsm.Token)(nil)
	_ orgkey.Sealer   = (*hsm.Token)(nil)
)

func main() {
	_, err := hsm.Open(context.Background(), hsm.Config{})
	fmt.Println(err)
}
