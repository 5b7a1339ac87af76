package main

import (
	"context"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/orgkeys/orgkeys/client"
	"github.com/orgkeys/orgkeys/internal/durable"
)

// ensureRecipient returns the private key of --recipient-file, which is the
// recipient or with --origin node the node's own, and makes it first if there is
// none. It is durable before anybody is told of it.
func ensureRecipient(ctx context.Context, s settings) (client.PrivateKey, error) {
	parent := filepath.Dir(s.recipientFile)
	if err := durable.MkdirAll(parent); err != nil {
		return nil, cannotStore(s.recipientFile, err)
	}
	key, err := readRecipient(s)
	if err == nil {
		err = s.suits(key)
	}
	if err == nil {
		// The run that stored it may have been interrupted before this.
		if err := durable.Sync(parent); err != nil {
			return nil, cannotStore(s.recipientFile, err)
		}
		return key, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	key, text, err := s.newKey(ctx)
	if err != nil {
		return nil, err
	}
	defer clear(text)
	return key, storeRecipient(s.recipientFile, text)
}

func storeRecipient(path string, text []byte) error {
	root, err := os.OpenRoot(filepath.Dir(path))
	if err != nil {
		return cannotStore(path, err)
	}
	defer root.Close()
	if _, err := (&dir{root: root}).replace(filepath.Base(path), text); err != nil {
		return cannotStore(path, err)
	}
	return nil
}

func readRecipient(s settings) (client.PrivateKey, error) {
	key, err := readKey(s, s.recipientFile)
	if f, ok := errors.AsType[*failure](err); ok {
		return nil, &failure{f.exit, "recipient " + s.recipientFile, "remove it if no enrollment was begun with it; otherwise have an administrator revoke the enrollment first", f.err}
	}
	return key, err
}

// nameOf is the ID of a recipient; empty for what cannot be one.
func nameOf(key client.PrivateKey) string {
	public, ok := key.Public().(*rsa.PublicKey)
	if !ok {
		return ""
	}
	name, _ := client.RecipientID(public) // cannot fail for an RSA key
	return name
}

// recipient shows the public half of --recipient-file.
func recipient(ctx context.Context, s settings, r *report) error {
	d, err := openDir(ctx, filepath.Dir(s.recipientFile))
	if err != nil {
		return err
	}
	defer d.close()
	key, err := ensureRecipient(ctx, s)
	if err != nil {
		return err
	}
	r.Recipient = nameOf(key)
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return err
	}
	r.Public = string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
	r.add("recipient " + r.Recipient + " is in " + s.recipientFile)
	return nil
}

// unseal opens a sealed key. It asks no server.
func unseal(ctx context.Context, s settings, r *report) error {
	text, err := readLimited(s.sealedFile)
	if err != nil {
		return &failure{exitConfig, "reading --sealed-file", "save the server's answer there", err}
	}
	if err := isKey(s.sealedFile, text); err != nil {
		return err
	}
	recipient, err := readKey(s, s.recipientFile)
	if err != nil {
		return err
	}
	key, err := client.OpenSealed(text, recipient)
	if errors.Is(err, client.ErrKeyFailed) {
		return err
	}
	if err != nil {
		return &failure{exitConfig, "--sealed-file " + s.sealedFile, "fetch it again (GET /organization/ORG/key/ID/sealed), and check --recipient-file", err}
	}
	defer clear(key.PEM)
	private, err := client.ParsePrivateKey(key.PEM)
	if err != nil {
		return err
	}
	d, err := openDir(ctx, filepath.Dir(s.keyFile))
	if err != nil {
		return err
	}
	defer d.close()
	if exists(s.keyFile) {
		if there, err := readKey(s, s.keyFile); err != nil || client.Fingerprint(there.Public()) != client.Fingerprint(private.Public()) {
			return usageError("--key-file %s is there already, and is another key", s.keyFile)
		}
	}
	if _, err := d.replace(filepath.Base(s.keyFile), key.PEM); err != nil {
		return cannotStore(s.keyFile, err)
	}
	r.KeyID, r.Fingerprint = key.KeyID, key.Fingerprint
	r.add(fmt.Sprintf("key %s of %s, fingerprint %s, is in %s", key.KeyID, key.Org, key.Fingerprint, s.keyFile))
	if s.receiptFile == "" {
		return nil
	}
	receipt, err := key.SignReceipt(private)
	if err != nil {
		return err
	}
	if err := os.WriteFile(s.receiptFile, receipt, 0o600); err != nil {
		return cannotStore(s.receiptFile, err)
	}
	r.add("receipt in " + s.receiptFile)
	return nil
}

// isKey refuses an answer in which the server says why there is no key: a program
// that saves whatever succeeds also saves that it is not ready yet (202).
func isKey(path string, text []byte) error {
	var said struct {
		Code client.Code `json:"errorCode"`
	}
	if err := json.Unmarshal(text, &said); err != nil || said.Code == "" {
		return nil // what it is else, is seen when it is opened
	}
	hint := "it is the server's refusal"
	if said.Code == client.Pending {
		hint = "the key was not ready yet: send the same request again, until its status is 200"
	}
	return &failure{exitConfig, fmt.Sprintf("--sealed-file %s holds no key, but the answer %.64q", path, said.Code), hint, nil}
}

// readLimited reads a file that is no longer than a sealed key's answer may be.
func readLimited(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxKeyFile))
	if err == nil && strings.TrimSpace(string(text)) == "" {
		err = errors.New("it is empty")
	}
	return text, err
}
