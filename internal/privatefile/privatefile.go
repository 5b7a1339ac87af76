// Package privatefile reads files that hold secrets: PINs, tokens, private
// keys, settings with passwords. It refuses one that others may read or change,
// with a text that says what to do.
//
// A private file is readable by its owner alone. Where somebody else
// mounts it, that is impossible: Kubernetes mounts a secret root:fsGroup
// with mode 0440 or 0640, systemd gives a service its credentials as root:root
// with mode 0440 and an access control list. So a group may read, and no more,
// if it is one of the process's own groups, and the file is read only or belongs
// to another user. Entries of an access control list are judged the same way:
// there the mode's group bits are the list's mask (acl(5)) and say nothing of
// the group.
//
// On Windows modes say nothing, and access lists are not read: who may read a
// file there is left to the directory that it is in.
package privatefile

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"syscall"
)

// Readers are those who may read a file besides its owner.
type Readers int

// The readers that files have.
const (
	// Owner: nobody else, but for what the package's comment says of mounts.
	Owner Readers = iota
	// Group: one of the process's own groups as well. Vault Agent writes its sink 0640.
	Group
	// Everybody: the file is no secret, and only what others write to it is doubtful.
	Everybody
)

// Read returns the content of the file at path, which has at most limit bytes.
// The caller clears it.
func Read(path string, limit int, r Readers) ([]byte, error) {
	f, err := Open(path, r)
	if err != nil {
		return nil, err
	}
	defer f.Close() // opened for reading: nothing can be lost
	b := make([]byte, limit+1)
	n, err := io.ReadFull(f, b)
	switch {
	case err == nil:
		clear(b)
		return nil, fmt.Errorf("%s is larger than %d bytes", path, limit)
	case !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF):
		clear(b)
		return nil, err
	}
	return b[:n], nil
}

// Open opens a regular file that nobody but its readers may read, and nobody
// but its owner may change.
func Open(path string, r Readers) (*os.File, error) {
	// Opening a pipe would wait for its other end.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrPermission) {
		return nil, fmt.Errorf("%w for %s: chown it to that user, or chgrp it to one of these groups and chmod 440", err, self())
	}
	if err != nil {
		return nil, err
	}
	if err := check(f, path, r); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func check(f *os.File, path string, r Readers) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s is not a regular file", path)
	}
	p, err := permissionsOf(f, info)
	if err != nil {
		return fmt.Errorf("finding out who may read %s: %w", path, err)
	}
	if problem := p.judge(self(), r); problem != "" {
		return fmt.Errorf("%s %s", path, problem)
	}
	return nil
}

// CheckDir refuses a directory that others may enter. One that somebody else
// has made for a group of this process, as Kubernetes does with a volume and
// fsGroup (root:fsGroup, 2770), is taken as it is: this process could not change it.
func CheckDir(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	mode := modeOf(info)
	owner, group := ownersOf(info)
	me := self()
	if mode&0o077 == 0 || mode&0o007 == 0 && owner != me.user && me.in(group) {
		return nil
	}
	return fmt.Errorf("others may enter the directory %s (mode %04o): chmod 700 %s", path, mode, path)
}

// identity is the user and the groups of the process.
type identity struct {
	user   int
	groups []int
}

func self() identity {
	// An error leaves the process's primary group, and so refuses more.
	groups, _ := os.Getgroups()
	return identity{os.Geteuid(), append(groups, os.Getegid())}
}

func (i identity) in(group int) bool { return slices.Contains(i.groups, group) }

func (i identity) String() string {
	groups := slices.Compact(slices.Sorted(slices.Values(i.groups)))
	return fmt.Sprintf("user %d with groups %s", i.user, strings.Trim(fmt.Sprint(groups), "[]"))
}

// permissions are a file's mode and what its access control list adds.
type permissions struct {
	mode  fs.FileMode
	owner int
	group int   // -1: no group may do anything
	users []int // named in the list
	more  []int // groups named in the list
	write bool  // something but the owner is given more than reading
}

const what = "chmod 600 it, or 440 where one of this process's groups is to read it (in Kubernetes fsGroup and defaultMode: 0440)"

// judge returns what is wrong with a file and how to fix it, or an empty text.
func (p permissions) judge(me identity, r Readers) string {
	others, remedy := p.mode&0o007, what
	if r == Everybody {
		others, remedy = others&0o002, "chmod 644 it"
	}
	switch {
	case others != 0 && r == Everybody:
		return fmt.Sprintf("may be changed by others (mode %04o): %s", p.mode, remedy)
	case others != 0:
		return fmt.Sprintf("may be read or written by others (mode %04o): %s", p.mode, remedy)
	case p.write:
		return fmt.Sprintf("may be changed by its group (mode %04o): %s", p.mode, remedy)
	case r == Everybody:
		return ""
	}
	for _, user := range p.users {
		if user != me.user && user != 0 {
			return fmt.Sprintf("may be read by user %d: setfacl -b and chmod 600 it", user)
		}
	}
	groups := p.more
	if p.group >= 0 {
		groups = append(groups, p.group)
	}
	for _, group := range groups {
		if !me.in(group) {
			return fmt.Sprintf("may be read by group %d (mode %04o), and this runs as %s: chmod 600 it, or run with that group (in Kubernetes fsGroup, in a systemd unit SupplementaryGroups=)", group, p.mode, me)
		}
	}
	if p.group >= 0 && r == Owner && p.mode&0o200 != 0 && p.owner == me.user {
		return fmt.Sprintf("may be read by others, those in group %d (mode %04o): chmod 600 it, or 440 if they are to read it", p.group, p.mode)
	}
	return ""
}
