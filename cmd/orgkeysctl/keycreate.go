package main

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/orgkeys/orgkeys/client"
	"github.com/orgkeys/orgkeys/internal/durable"
	"github.com/orgkeys/orgkeys/internal/privatefile"
)

const (
	recipientBits = 3072
	maxArrival    = 64 << 10 // bytes of its file
)

func newKeyCreate(s *settings) *cobra.Command {
	var out string
	var plain bool
	cmd := &cobra.Command{
		Use: "create --out FILE", Short: "Have a key made, and write its private half to a file",
		Long: `Has an organization key made, and writes its private half to a file that nobody else
may read (PKCS#1, PEM). A file that is there already is never overwritten.

The server's back end encrypts the private key to a recipient key that is made here,
so neither the server nor anything in between can read it. A run that was
interrupted, wherever, is completed by the next: it gets the same key, and takes no
second place in the quota. The recipient key is in --dir until then.

--plain asks for the private key as it is, for back ends that cannot encrypt it. An
answer that is lost then is a key that nobody has: delete it and create another.`,
		Args: cobra.NoArgs,
		RunE: s.connected(func(ctx context.Context, c *connection, _ []string) error {
			path, err := filepath.Abs(out)
			if err != nil {
				return err
			}
			create := createSealed
			if plain {
				create = createPlain
			}
			key, err := create(ctx, c, path)
			if err != nil {
				return err
			}
			return key.print(c)
		}),
	}
	cmd.Flags().StringVar(&out, "out", "", "the `file` to write the private key to")
	cmd.Flags().BoolVar(&plain, "plain", false, "do not have the key encrypted to this machine")
	if err := cmd.MarkFlagRequired("out"); err != nil {
		panic(err) // the flag is defined above
	}
	return cmd
}

// made is a key whose private half is in a file, whole.
type made struct {
	ID          string `json:"id"`
	Org         string `json:"orgId"`
	Fingerprint string `json:"fingerprint"`
	File        string `json:"file"`
	Sealed      bool   `json:"sealed"`
}

func (m made) print(c *connection) error {
	if c.json {
		return printJSON(c.out, m)
	}
	way := "encrypted to this machine, and received"
	if !m.Sealed {
		way = "plain"
	}
	return fields(c.out, field{"key", m.ID}, field{"organization", m.Org}, field{"fingerprint", m.Fingerprint}, field{"delivery", way}, field{"file", m.File})
}

// progress says what goes on, to a person who watches.
func (c *connection) progress(text string) {
	if !c.json {
		c.warn(text)
	}
}

// warn says what nobody may miss. Standard output is for what was asked for alone.
func (c *connection) warn(text string) { fmt.Fprintln(c.log, "orgkeysctl:", text) }

func createPlain(ctx context.Context, c *connection, path string) (made, error) {
	file, err := newFile(path, rand.Text())
	if err != nil {
		return made{}, err
	}
	defer file.Discard()
	c.progress("asking the server for a key…")
	key, err := c.GenerateKey(ctx, c.Org)
	if err != nil {
		if !nothingCameOfIt(err) {
			c.warn(`there may be a key now that nobody has: "orgkeysctl key list" shows it, delete it`)
		}
		return made{}, err
	}
	defer clear(key.PEM)
	m := made{key.ID, c.Org, key.Fingerprint, path, false}
	if err := m.write(file, key.PEM); err != nil {
		return made{}, fmt.Errorf("%w (nobody has key %s now: delete it)", err, key.ID)
	}
	return m, nil
}

// nothingCameOfIt reports a failure after which nothing was made: the server said
// so, or was not asked.
func nothingCameOfIt(err error) bool {
	_, refused := errors.AsType[*client.Error](err)
	return refused || client.Unsent(err)
}

// newFile makes sure, before there is a secret, that it can be written.
func newFile(path, writer string) (*durable.New, error) {
	file, err := durable.Create(path, writer)
	if errors.Is(err, fs.ErrExist) {
		return nil, &failure{exit: exitCannotWrite, what: path + " is there already, and is not overwritten", hint: "name another file"}
	}
	if err != nil {
		return nil, &failure{exitCannotWrite, path + " could not be written", "name a directory that you may write to", err}
	}
	return file, nil
}

// write writes the private key and checks that the file holds it.
func (m made) write(file *durable.New, text []byte) error {
	if err := file.Write(text); err != nil {
		return &failure{exitCannotWrite, "writing the key", "", err}
	}
	if !holdsKey(m.File, m.Fingerprint) {
		return &failure{exit: exitCannotWrite, what: m.File + " does not hold what was written to it", hint: "check the disk"}
	}
	return nil
}

// holdsKey reports whether a file has the private key of that fingerprint in it.
func holdsKey(path, fingerprint string) bool {
	key, err := readKey(path)
	return err == nil && client.Fingerprint(key.Public()) == fingerprint
}

func readKey(path string) (client.PrivateKey, error) {
	text, err := privatefile.Read(path, maxKeyFile, privatefile.Owner)
	if err != nil {
		return nil, err
	}
	defer clear(text)
	return client.ParsePrivateKey(text)
}

// arrival is a key on its way to this machine. It is stored before the first
// request, so that a run that was interrupted is completed by the next:
//
//	recipient stored → key asked for → where it goes stored → key written → receipt → removed
//
// CRASH between any two: the same recipient gets the same key until its receipt;
// and what is written, and where, is known before it is.
type arrival struct {
	Server    string          `json:"server"`
	Org       string          `json:"org"`
	Recipient []byte          `json:"recipient"` // PKCS#8
	File      string          `json:"file,omitempty"`
	Key       client.Delivery `json:"key,omitzero"` // the one that goes into File
	path      string
}

// arrivalName names the key that is on its way from server to org.
func (c *connection) arrivalName() string {
	sum := sha256.Sum256([]byte(c.server + "\n" + c.Org))
	return "arrival-" + hex.EncodeToString(sum[:8])
}

// arrivalPath is where it is kept.
func (c *connection) arrivalPath() string { return filepath.Join(c.dir, c.arrivalName()+".json") }

func createSealed(ctx context.Context, c *connection, path string) (m made, err error) {
	if err := durable.MkdirAll(c.dir); err != nil {
		return m, &failure{exit: exitCannotWrite, what: "--dir", err: err}
	}
	unlock, err := durable.Lock(ctx, c.arrivalPath()+".lock")
	if err != nil {
		return m, err
	}
	defer func() { err = errors.Join(err, unlock()) }()
	a, err := c.loadArrival()
	if err != nil {
		return m, err
	}
	if a != nil && a.File != "" {
		if err := durable.Clean(a.File, c.arrivalName()); err != nil {
			return m, &failure{exitCannotWrite, "a copy of the key that an interrupted run left could not be removed", "", err}
		}
	}
	if a != nil && a.File != "" && holdsKey(a.File, a.Key.Fingerprint) {
		if m, err = a.receive(ctx, c); err != nil || a.File == path {
			return m, err
		}
		c.warn("the key of an interrupted run is in " + a.File + "; this is another one")
		a = nil
	}
	return c.fetch(ctx, a, path)
}

// fetch has the key of a, or of a new arrival, made and written to path.
func (c *connection) fetch(ctx context.Context, a *arrival, path string) (made, error) {
	file, err := newFile(path, c.arrivalName())
	if err != nil {
		return made{}, err
	}
	defer file.Discard()
	if a == nil {
		c.progress("making a recipient key…")
		if a, err = c.newArrival(); err != nil {
			return made{}, err
		}
	} else {
		c.progress("going on with the key of an interrupted run…")
	}
	defer clear(a.Recipient)
	recipient, err := x509.ParsePKCS8PrivateKey(a.Recipient)
	if err != nil {
		return made{}, a.broken(err)
	}
	c.progress("asking the server for a key…")
	key, err := c.SealedKey(ctx, c.Org, recipient.(*rsa.PrivateKey)) // which newArrival made, or loadArrival checked
	if err != nil {
		return made{}, err
	}
	defer clear(key.PEM)
	if before := a.Key.KeyID; before != "" && before != key.KeyID {
		c.warn("key " + before + ", which an interrupted run wrote to " + a.File + ", was received, withdrawn or deleted before; this is another one, " + key.KeyID)
	}
	a.File, a.Key = path, key.Delivery
	if err := a.store(); err != nil {
		return made{}, err
	}
	if err := a.made().write(file, key.PEM); err != nil {
		return made{}, err
	}
	return a.receive(ctx, c)
}

func (a *arrival) made() made { return made{a.Key.KeyID, a.Org, a.Key.Fingerprint, a.File, true} }

// receive signs for the key that is in its file, and forgets the recipient.
func (a *arrival) receive(ctx context.Context, c *connection) (made, error) {
	key, err := readKey(a.File)
	if err != nil {
		return made{}, &failure{exit: exitConfig, what: "the key that was written", err: err}
	}
	switch err := c.Receipt(ctx, a.Key, key); {
	case errors.Is(err, client.KeyNotFound), errors.Is(err, client.EnrollmentNotFound), errors.Is(err, client.EnrollmentClosed):
		return made{}, errors.Join(&failure{exitRefused, "the server withdrew or deleted key " + a.Key.KeyID + " before it heard that it arrived",
			"delete " + a.File + " and run this again", err}, durable.Remove(a.path))
	case err != nil:
		c.warn("the key is in " + a.File + ", and the server may not know that yet: run the same command again before you move it")
		return made{}, err
	}
	if err := durable.Remove(a.path); err != nil {
		return made{}, &failure{exitCannotWrite, "key " + a.Key.KeyID + " is in " + a.File + ", and its recipient, which nobody needs any more, cannot be removed", "delete " + a.path, err}
	}
	return a.made(), nil
}

func (c *connection) newArrival() (*arrival, error) {
	recipient, err := rsa.GenerateKey(rand.Reader, recipientBits)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(recipient)
	if err != nil {
		return nil, err
	}
	a := &arrival{Server: c.server, Org: c.Org, Recipient: der, path: c.arrivalPath()}
	return a, a.store()
}

func (a *arrival) store() error {
	text, err := json.Marshal(a)
	if err != nil {
		return err
	}
	defer clear(text)
	if err := durable.Replace(a.path, text); err != nil {
		return &failure{exit: exitCannotWrite, what: "storing the recipient key", err: err}
	}
	return nil
}

// loadArrival returns what an interrupted run left, nil if there is nothing.
func (c *connection) loadArrival() (*arrival, error) {
	a := &arrival{path: c.arrivalPath()}
	text, err := privatefile.Read(a.path, maxArrival, privatefile.Owner)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, &failure{exit: exitConfig, what: "a key on its way", err: err}
	}
	defer clear(text)
	if err := json.Unmarshal(text, a); err != nil {
		return nil, a.broken(err)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(a.Recipient)
	if _, ok := parsed.(*rsa.PrivateKey); !ok || a.Server != c.server || a.Org != c.Org {
		return nil, a.broken(errors.Join(err, errors.New("it is about something else")))
	}
	return a, nil
}

func (a *arrival) broken(err error) error {
	return &failure{exitConfig, a.path + " is not the recipient of a key on its way", "delete it; a key that was on its way is lost then", err}
}

// publicPEM is a public key that the server showed, as PEM of our own making:
// what follows or precedes the block is not repeated.
func publicPEM(text string) ([]byte, error) {
	block, _ := pem.Decode([]byte(text))
	if block == nil {
		return nil, &failure{exit: exitProtocol, what: "the server shows a public key that is none"}
	}
	if _, err := x509.ParsePKIXPublicKey(block.Bytes); err != nil {
		return nil, &failure{exit: exitProtocol, what: "the server shows a public key that is none", err: err}
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: block.Bytes}), nil
}
