package authn

import (
	"context"
	"fmt"
	"log/slog"
	"reflect"
	"time"
)

// pollInterval is how often the file of issuers is read. A change is applied
// when two readings agree, so that a file that is being written does not count as
// broken.
const pollInterval = 500 * time.Millisecond

// Follow applies changes of the file of issuers until ctx ends, each within two
// seconds. A change is logged once: as applied, or as unusable, and then the previous
// issuers stay in force. An issuer whose keys stay at the same place keeps its key set.
func (v *Verifier) Follow(ctx context.Context, path string, interval time.Duration, log *slog.Logger) {
	f := fileFollower{verifier: v, path: path, interval: interval, log: log}
	ticker := time.NewTicker(pollInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			f.poll()
		}
	}
}

// fileFollower remembers what was read and done about it.
type fileFollower struct {
	verifier      *Verifier
	path          string
	interval      time.Duration
	log           *slog.Logger
	seen, handled string // by the last reading, and settled: the text, or why there is none
}

func (f *fileFollower) poll() {
	b, err := readGuarded(f.path)
	found := string(b)
	if err != nil {
		found = err.Error()
	}
	settled := found == f.seen
	f.seen = found
	if !settled || found == f.handled {
		return
	}
	f.handled = found
	if err == nil {
		err = f.take(b)
	}
	if err != nil {
		f.log.Error("the file of issuers changed and cannot be used; the previous issuers stay in force", "error", fmt.Errorf("ORGKEYS_ISSUERS_FILE: %w", err))
	}
}

// take puts the issuers that the text describes in force, unless they are already.
func (f *fileFollower) take(text []byte) error {
	configured, err := parseIssuers(f.path, text)
	if err != nil {
		return err
	}
	there := *f.verifier.issuers.Load()
	var before []IssuerConfig
	for _, i := range there {
		before = append(before, i.described)
	}
	if reflect.DeepEqual(before, configured) {
		return nil
	}
	issuers, err := open(configured, there, f.interval, f.log)
	if err != nil {
		return err
	}
	f.verifier.replace(issuers)
	var names []string
	for _, i := range issuers {
		names = append(names, i.Name)
	}
	f.log.Info("issuers replaced", "issuers", names)
	return nil
}
