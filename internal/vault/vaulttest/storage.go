package vaulttest

import (
	"context"
	"crypto/rsa"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/go-json-experiment/json"
)

// Version is a version of a Transit key in its archive.
type Version struct {
	Key []byte          `json:"key"`     // of a symmetric key
	RSA *rsa.PrivateKey `json:"rsa_key"` // of an RSA key
}

// Stored returns the files of the storage that hold a key of Transit: its "policy", or its "archive".
func (s *Server) Stored(kind, name string) ([]string, error) {
	return filepath.Glob(filepath.Join(s.Dir, "storage", "logical", "*", kind, "_"+name))
}

// Archived returns what the archive of a key holds, behind Vault's barrier; nothing if
// there is none.
func (s *Server) Archived(ctx context.Context, name string) ([]Version, error) {
	files, err := s.Stored("archive", name)
	if err != nil || len(files) == 0 {
		return nil, err
	}
	root, err := s.Client(s.RootToken)
	if err != nil {
		return nil, err
	}
	mount := filepath.Base(filepath.Dir(filepath.Dir(files[0])))
	raw, err := root.Logical().ReadWithContext(ctx, "sys/raw/logical/"+mount+"/archive/"+name)
	if err != nil || raw == nil {
		return nil, err
	}
	var archive struct {
		Keys []Version `json:"keys"`
	}
	err = json.Unmarshal([]byte(raw.Data["value"].(string)), &archive)
	return archive.Keys, err
}

// HoldsPrivateKey reports whether the archive of a key holds an RSA private key.
func (s *Server) HoldsPrivateKey(ctx context.Context, name string) (bool, error) {
	versions, err := s.Archived(ctx, name)
	for _, v := range versions {
		if v.RSA != nil && v.RSA.D != nil {
			return true, err
		}
	}
	return false, err
}

// Orphans returns the names of the keys that Transit does not have any more, and whose archives
// hold a private key.
func (s *Server) Orphans(ctx context.Context) ([]string, error) {
	archives, err := s.Stored("archive", "*")
	if err != nil {
		return nil, err
	}
	var orphans []string
	for _, file := range archives {
		name := strings.TrimPrefix(filepath.Base(file), "_")
		if there, err := s.Stored("policy", name); err != nil || len(there) > 0 {
			if err != nil {
				return nil, err
			}
			continue
		}
		held, err := s.HoldsPrivateKey(ctx, name)
		if err != nil {
			return nil, err
		}
		if held {
			orphans = append(orphans, name)
		}
	}
	return orphans, nil
}

// KeepArchive has the storage fail to delete the archive of a key until it is restored. A
// deletion meanwhile ends as one that is interrupted: Vault has deleted the key itself.
func (s *Server) KeepArchive(name string) (restore func() error, err error) {
	files, err := s.Stored("archive", name)
	if err != nil || len(files) != 1 {
		return nil, errors.Join(errors.New("the key has no archive"), err)
	}
	file, aside := files[0], filepath.Join(s.Dir, "kept-"+name)
	// A directory that is not empty cannot be removed by unlinking it.
	if err := errors.Join(os.Rename(file, aside), os.MkdirAll(filepath.Join(file, "x"), 0o700)); err != nil {
		return nil, err
	}
	return sync.OnceValue(func() error { return errors.Join(os.RemoveAll(file), os.Rename(aside, file)) }), nil
}
