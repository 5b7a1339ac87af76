package privatefile

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// An access control list as the kernel shows it: a version, then entries of 8
// bytes (linux/posix_acl_xattr.h).
const (
	aclName    = "system.posix_acl_access"
	aclVersion = 2
	aclEntry   = 8
	aclMost    = 64 << 10 // bytes of an extended attribute

	aclUser     = 0x02 // a named user
	aclGroupObj = 0x04 // the file's group
	aclGroup    = 0x08 // a named group
	aclMask     = 0x10 // what named users and groups may do at most
)

func permissionsOf(f *os.File, info fs.FileInfo) (permissions, error) {
	p := permissions{mode: info.Mode().Perm(), owner: -1, group: -1}
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return p, errors.New("its owner is not known")
	}
	p.owner = int(stat.Uid)
	if p.mode&0o070 == 0 {
		return p, nil // with an access control list, nobody but the owner may do anything either
	}
	list := make([]byte, aclMost)
	n, err := unix.Fgetxattr(int(f.Fd()), aclName, list)
	if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.ENOTSUP) {
		p.group, p.write = int(stat.Gid), p.mode&0o030 != 0
		return p, nil
	}
	if err != nil {
		return p, fmt.Errorf("reading its access control list: %w", err)
	}
	return p, p.add(list[:n], int(stat.Gid))
}

// add takes in an access control list. The mode's group bits are its mask.
func (p *permissions) add(list []byte, group int) error {
	if len(list) < 4 || (len(list)-4)%aclEntry != 0 || binary.LittleEndian.Uint32(list) != aclVersion {
		return errors.New("its access control list is of an unknown form")
	}
	mask := uint16(p.mode >> 3 & 7)
	for e := list[4:]; len(e) > 0; e = e[aclEntry:] {
		may, id := binary.LittleEndian.Uint16(e[2:])&mask, int(binary.LittleEndian.Uint32(e[4:]))
		tag := binary.LittleEndian.Uint16(e)
		if may == 0 || tag != aclUser && tag != aclGroup && tag != aclGroupObj {
			continue
		}
		p.write = p.write || may&3 != 0
		switch tag {
		case aclUser:
			p.users = append(p.users, id)
		case aclGroup:
			p.more = append(p.more, id)
		case aclGroupObj:
			p.group = group
		}
	}
	return nil
}
