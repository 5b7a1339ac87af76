package vault

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"time"

	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// Live answers which of names are still needed: by a generation under way, reserved
// or pending and not expired, or because they are in the pool.
type Live func(ctx context.Context, names []string) (map[string]bool, error)

// Traces are names under which a process that died may have left an archive without its key,
// which no list shows.
type Traces interface {
	Traces(ctx context.Context) ([]orgkey.Trace, error)
	ForgetTraces(ctx context.Context, names []string) error
}

// Reap deletes the keys that a crash left in Transit, and returns how many: a
// key is deleted if no generation needs it and it is older than the grace.
//
// Several replicas may reap at once. A name is written into its reservation
// before its key is created and is never used again, so a key that was listed
// and that no generation needs any more has no owner; and deleting what
// another replica has just deleted is no error.
//
// An attempt of a sealed delivery likewise writes its name there before its key is created,
// and the delivery has it until the attempt is given up or its life is over.
func (c *Client) Reap(ctx context.Context, live Live) (int, error) {
	generated, err := c.reapMount(ctx, keysMount, live)
	sealed, sealedErr := c.reapMount(ctx, sealedMount, live)
	return generated + sealed, errors.Join(err, sealedErr, c.settle(ctx), c.followTraces(ctx))
}

func (c *Client) reapMount(ctx context.Context, mount string, live Live) (int, error) {
	names, err := c.keyNames(ctx, mount)
	if err != nil || len(names) == 0 {
		return 0, err
	}
	alive, err := live(ctx, names)
	if err != nil {
		return 0, fmt.Errorf("asking for live reservations: %w", err)
	}
	reaped := 0
	var failed []error
	for _, name := range names {
		if alive[name] {
			continue
		}
		deleted, err := c.reapOne(correlated(ctx, name), mount+"/keys/"+name)
		if err != nil {
			failed = append(failed, fmt.Errorf("reaping key %s: %w", name, err))
		}
		if deleted {
			reaped++
		}
	}
	return reaped, errors.Join(failed...)
}

// ReapEvery reaps at an interval until ctx ends.
func (c *Client) ReapEvery(ctx context.Context, interval time.Duration, live Live) {
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		n, err := c.Reap(ctx, live)
		if err != nil && ctx.Err() == nil {
			c.config.Log.Warn("deleting keys that a crash left in Transit", "error", err)
		}
		if n > 0 {
			c.config.Log.Warn("deleted keys that a crash left in Transit", "count", n)
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

func (c *Client) reapOne(ctx context.Context, path string) (deleted bool, err error) {
	k, age, err := c.read(ctx, path)
	switch {
	case errors.Is(err, errNotFound):
		return false, nil
	case err != nil:
		return false, err
	case k.blank():
		return false, c.reapBlank(ctx, path, age)
	case age <= c.config.ReapGrace:
		return false, nil
	}
	// The crash may have come before the key's deletion was allowed.
	if err := c.removeAllowing(ctx, path); err != nil {
		return false, err
	}
	return true, nil
}

// keyNames lists the keys in a mount of Transit whose names are of the form that the
// keystore uses. Others are not the service's to delete.
func (c *Client) keyNames(ctx context.Context, mount string) ([]string, error) {
	answer, err := c.do(ctx, request{method: http.MethodGet, path: mount + "/keys", query: url.Values{"list": {"true"}}})
	if errors.Is(err, errNotFound) && !missingMount(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("listing the keys in Transit: %w", err)
	}
	list, err := data[struct {
		Keys []string `json:"keys"`
	}](answer.body)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, name := range list.Keys {
		if nameForm.MatchString(name) {
			names = append(names, name)
		}
	}
	return names, nil
}

// read returns what Transit says of the key at path, and how long ago it was created, by
// Vault's clock.
func (c *Client) read(ctx context.Context, path string) (k transitKey, age time.Duration, err error) {
	answer, err := c.do(ctx, request{method: http.MethodGet, path: path})
	if err != nil {
		return k, 0, err
	}
	if k, err = data[transitKey](answer.body); err != nil {
		return k, 0, err
	}
	first, err := k.first()
	if err != nil {
		return k, 0, fmt.Errorf("reading a key's first version: %w", err)
	}
	return k, answer.date.Sub(first.Created), nil
}
