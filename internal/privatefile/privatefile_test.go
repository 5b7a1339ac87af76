package privatefile

import (
	"encoding/binary"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// The process is user 1000 with groups 1000 and 2000.
func TestWhoMayReadAPrivateFile(t *testing.T) {
	me := identity{1000, []int{1000, 2000}}
	for _, tt := range []struct {
		name string
		p    permissions
		r    Readers
		want string // "": accepted
	}{
		{"its owner alone", permissions{mode: 0o600, owner: 1000, group: -1}, Owner, ""},
		{"its owner alone, root's", permissions{mode: 0o400, owner: 0, group: -1}, Owner, ""},
		{"fsGroup, defaultMode 0400", permissions{mode: 0o440, owner: 0, group: 2000}, Owner, ""},
		{"fsGroup, defaultMode 0600", permissions{mode: 0o640, owner: 0, group: 2000}, Owner, ""},
		{"its own, read only", permissions{mode: 0o440, owner: 1000, group: 1000}, Owner, ""},
		{"its own, left to the group", permissions{mode: 0o640, owner: 1000, group: 1000}, Owner, "chmod 600"},
		{"Vault Agent's sink", permissions{mode: 0o640, owner: 1000, group: 1000}, Group, ""},
		{"systemd's credential", permissions{mode: 0o440, owner: 0, group: -1, users: []int{1000}}, Owner, ""},
		{"another group's", permissions{mode: 0o440, owner: 0, group: 3000}, Owner, "may be read by group 3000"},
		{"another group's token", permissions{mode: 0o440, owner: 0, group: 3000}, Group, "may be read by group 3000"},
		{"another group in a list", permissions{mode: 0o440, owner: 0, group: -1, more: []int{2000, 3000}}, Owner, "SupplementaryGroups="},
		{"another user in a list", permissions{mode: 0o440, owner: 0, group: -1, users: []int{1000, 1001}}, Owner, "may be read by user 1001"},
		{"a list in which its group may change it", permissions{mode: 0o460, owner: 0, group: 2000, write: true}, Owner, "may be changed by its group"},
		{"everybody", permissions{mode: 0o444, owner: 0, group: 2000}, Owner, "defaultMode: 0440"},
		{"everybody but its group", permissions{mode: 0o404, owner: 0, group: -1}, Group, "others"},
		{"no secret", permissions{mode: 0o644, owner: 0, group: 3000}, Everybody, ""},
		{"no secret, changed by anybody", permissions{mode: 0o646, owner: 0, group: 3000}, Everybody, "others"},
		{"no secret, changed by a group", permissions{mode: 0o664, owner: 0, group: 2000, write: true}, Everybody, "changed by its group"},
	} {
		if got := tt.p.judge(me, tt.r); (got == "") != (tt.want == "") || !strings.Contains(got, tt.want) {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
}

func file(t *testing.T, mode fs.FileMode) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
	return path
}

func want(t *testing.T, path string, r Readers, refused string) {
	t.Helper()
	b, err := Read(path, 6, r)
	if refused == "" && (err != nil || string(b) != "secret") {
		t.Errorf("%q, %v", b, err)
	}
	if refused != "" && (err == nil || !strings.Contains(err.Error(), refused)) {
		t.Errorf("%q, %v, want %q", b, err, refused)
	}
}

func TestRealFiles(t *testing.T) {
	for mode, refused := range map[fs.FileMode]string{0o600: "", 0o400: "", 0o440: "", 0o640: "chmod 600", 0o460: "changed", 0o604: "others", 0o602: "others", 0o644: "others"} {
		want(t, file(t, mode), Owner, refused)
	}
	want(t, file(t, 0o640), Group, "")
	want(t, file(t, 0o644), Everybody, "")
	want(t, t.TempDir(), Owner, "not a regular file")
	pipe := filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	want(t, pipe, Owner, "not a regular file")
	if _, err := Read(file(t, 0o600), 5, Owner); err == nil {
		t.Error("more than the limit was read")
	}
	if os.Geteuid() == 0 { // nobody else can give a file away
		foreign := file(t, 0o440)
		if err := os.Chown(foreign, 0, 54321); err != nil {
			t.Fatal(err)
		}
		want(t, foreign, Owner, "may be read by group 54321")
	}
}

// acl gives a file an access control list: its owner may read, and these users.
func acl(t *testing.T, path string, users ...int) {
	t.Helper()
	list := binary.LittleEndian.AppendUint32(nil, aclVersion)
	entry := func(tag, may uint16, id uint32) {
		list = binary.LittleEndian.AppendUint16(list, tag)
		list = binary.LittleEndian.AppendUint16(list, may)
		list = binary.LittleEndian.AppendUint32(list, id)
	}
	const none = ^uint32(0)
	entry(0x01, 4, none) // the owner
	for _, user := range users {
		entry(aclUser, 4, uint32(user))
	}
	entry(aclGroupObj, 0, none)
	entry(aclMask, 4, none)
	entry(0x20, 0, none) // others
	if err := unix.Setxattr(path, aclName, list, 0); err != nil {
		t.Fatalf("the temporary directory takes no access control lists: %v", err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o440 {
		t.Fatalf("mode %v, %v, want the 0440 that systemd's credentials have", info.Mode(), err)
	}
}

func TestAccessControlLists(t *testing.T) {
	mine := file(t, 0o400)
	acl(t, mine, os.Geteuid())
	want(t, mine, Owner, "")
	shared := file(t, 0o400)
	acl(t, shared, os.Geteuid(), 54321)
	want(t, shared, Owner, "may be read by user 54321")
}

func TestDirectories(t *testing.T) {
	for mode, fine := range map[fs.FileMode]bool{0o700: true, 0o500: true, 0o750: false, 0o770: false, 0o755: false, 0o701: false} {
		path := t.TempDir()
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		if err := CheckDir(path); (err == nil) != fine || err != nil && !strings.Contains(err.Error(), "chmod 700 "+path) {
			t.Errorf("%04o: %v", mode, err)
		}
	}
}
