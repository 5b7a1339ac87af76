//go:build !linux && !windows

package privatefile

import (
	"errors"
	"io/fs"
	"os"
	"syscall"
)

func permissionsOf(_ *os.File, info fs.FileInfo) (permissions, error) {
	p := permissions{mode: info.Mode().Perm(), owner: -1, group: -1}
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return p, errors.New("its owner is not known")
	}
	p.owner = int(stat.Uid)
	if p.mode&0o070 != 0 {
		p.group, p.write = int(stat.Gid), p.mode&0o030 != 0
	}
	return p, nil
}
