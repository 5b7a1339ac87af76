package vault

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"path"
	"slices"
	"sync"
	"time"
)

// Transit keeps a key in two places of its storage: under "policy", and all its versions
// once more under "archive". A deletion removes them in this order, in the context of its
// request. When the connection ends in between, or the storage fails, the key does not
// exist any more and its archive stays, which nothing in Vault's API shows or removes.
//
// Only the answer 204 says that both are gone: 400 may be that failure, too. Without a 204,
// the name is given a blank, a key that Transit makes under the same name: making it writes
// the archive anew, before anything else, with the blank alone.
//
// A blank must not be taken for the key. It cannot be exported, and whoever wants to create a
// key finds that it is not a new one. Its deletion is not allowed, and so nobody whose
// deletion comes too late for the key has one answered with 204: that is how the taker of a
// pool key knows that it is the only one. The reaper allows it, after Config.BlankAge.

// blankBody is the request for a blank. Without a type it is Transit's default, aes256-gcm96,
// which costs next to nothing.
const blankBody = `{}`

// blankAge is for how many time limits of a call a blank stays. Whoever has exported the key
// before it was deleted has sent its own deletion by then, and has the answer.
const blankAge = 6

// errStillThere: a key was deleted and exists.
var errStillThere = errors.New("it is still there")

// blank reports whether k is one.
func (k transitKey) blank() bool { return k.Type == "aes256-gcm96" && !k.Exportable }

// remove deletes the key at path, with its archive, and confirms that it is gone. Transit
// answers a deletion with 400 both when there is no such key and when deleting it is not
// allowed; reading tells which. It continues after ctx has ended, within the time limits
// of its calls: to interrupt a deletion is what leaves an archive.
func (c *Client) remove(ctx context.Context, path string) error {
	ctx = context.WithoutCancel(ctx)
	answer, deleteErr := c.do(ctx, request{method: http.MethodDelete, path: path})
	if deleteErr == nil && answer.status == http.StatusNoContent {
		c.doubts.drop(path)
		return c.confirmGone(ctx, path)
	}
	err := deleteErr
	if err == nil || badRequest(err) {
		err = c.eraseArchive(ctx, path)
	}
	switch {
	case errors.Is(err, errStillThere):
		return errors.Join(err, deleteErr)
	case err != nil:
		c.doubts.add(path)
		return errors.Join(err, deleteErr)
	}
	c.doubts.drop(path)
	return nil
}

// removeAllowing is remove for a key whose deletion may not be allowed yet, as a creation
// that was interrupted leaves it. It does not begin by allowing it: that would be for a blank, too.
func (c *Client) removeAllowing(ctx context.Context, path string) error {
	err := c.remove(ctx, path)
	if !errors.Is(err, errStillThere) {
		return err
	}
	// If another replica has deleted it since, this fails and remove finds it gone.
	allowErr := c.allowDeletion(ctx, path)
	if err := c.remove(ctx, path); err != nil {
		return errors.Join(err, allowErr)
	}
	return nil
}

// removeOwn deletes the key at path and confirms that it is gone. Unless the one
// deletion that it sends first is answered with 204, it removes the key nevertheless,
// and reports errNotOwn.
func (c *Client) removeOwn(ctx context.Context, path string) error {
	answer, err := c.do(once(context.WithoutCancel(ctx)), request{method: http.MethodDelete, path: path})
	if err == nil && answer.status == http.StatusNoContent {
		return c.confirmGone(ctx, path)
	}
	return errors.Join(errNotOwn, err, c.remove(ctx, path))
}

// confirmGone reports an error unless there is no key at path, or a blank.
func (c *Client) confirmGone(ctx context.Context, path string) error {
	k, _, err := c.read(ctx, path)
	switch {
	case errors.Is(err, errNotFound), err == nil && k.blank():
		return nil
	case err != nil:
		return fmt.Errorf("confirming that it is deleted: %w", err)
	}
	return errStillThere
}

// eraseArchive makes sure that Transit's storage holds nothing of a key at path that does not
// exist any more. If there is one, it leaves it alone, and reports errStillThere.
func (c *Client) eraseArchive(ctx context.Context, path string) error {
	k, _, err := c.read(ctx, path)
	switch {
	case err == nil && k.blank():
		return nil
	case err == nil:
		return errStillThere
	case !errors.Is(err, errNotFound) || missingMount(err):
		return fmt.Errorf("confirming that it is deleted: %w", err)
	}
	// Where there is a key after all, this changes nothing and answers with that one.
	answer, err := c.do(ctx, request{method: http.MethodPut, path: path, body: []byte(blankBody)})
	if err != nil {
		return fmt.Errorf("overwriting its archive: %w", err)
	}
	if k, err = data[transitKey](answer.body); err == nil && !k.blank() {
		err = errStillThere
	}
	return err
}

// reapBlank deletes the blank at path once nobody can take it for the key any more. Who
// fails, or does so at the same time, leaves at most the blank's own archive.
func (c *Client) reapBlank(ctx context.Context, path string, age time.Duration) error {
	if age <= max(c.config.ReapGrace, c.config.BlankAge) {
		return nil
	}
	err := c.allowDeletion(ctx, path)
	if err == nil {
		_, err = c.do(context.WithoutCancel(ctx), request{method: http.MethodDelete, path: path})
	}
	if badRequest(err) { // another replica has deleted it
		return nil
	}
	return err
}

// doubts are the paths of keys that may have left an archive, because Vault has not said
// since that they did not.
type doubts struct {
	mu    sync.Mutex
	paths map[string]bool
}

func (d *doubts) add(path string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.paths == nil {
		d.paths = map[string]bool{}
	}
	d.paths[path] = true
}

func (d *doubts) drop(path string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.paths, path)
}

func (d *doubts) all() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Sorted(maps.Keys(d.paths))
}

// settle erases the archives of which it is in doubt whether they are there.
func (c *Client) settle(ctx context.Context) error {
	var failed []error
	for _, path := range c.doubts.all() {
		gone, err := c.erased(ctx, path)
		if err != nil {
			failed = append(failed, err)
		}
		if gone {
			c.doubts.drop(path)
		}
	}
	return errors.Join(failed...)
}

// followTraces erases the archives that processes which died may have left.
func (c *Client) followTraces(ctx context.Context) error {
	if c.config.Traces == nil {
		return nil
	}
	traces, err := c.config.Traces.Traces(ctx)
	if err != nil {
		return fmt.Errorf("asking what processes that died may have left: %w", err)
	}
	var failed []error
	var followed []string
	for _, t := range traces {
		gone := !nameForm.MatchString(t.Name) // not the keystore's
		if !gone {
			if gone, err = c.erased(ctx, aheadMount(t.Use)+"/keys/"+t.Name); err != nil {
				failed = append(failed, err)
			}
		}
		if gone {
			followed = append(followed, t.Name)
		}
	}
	if len(followed) > 0 {
		failed = append(failed, c.config.Traces.ForgetTraces(ctx, followed))
	}
	return errors.Join(failed...)
}

// erased is eraseArchive for a key that may be there still, which is left to the reaper.
func (c *Client) erased(ctx context.Context, place string) (gone bool, err error) {
	err = c.eraseArchive(correlated(ctx, path.Base(place)), place)
	if errors.Is(err, errStillThere) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("erasing what a deletion of %s may have left: %w", place, err)
	}
	return true, nil
}
