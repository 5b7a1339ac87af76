//go:build !windows

package privatefile

import (
	"io/fs"
	"syscall"
)

func modeOf(info fs.FileInfo) fs.FileMode { return info.Mode().Perm() }

// ownersOf returns user and group, -1 where they are not known.
func ownersOf(info fs.FileInfo) (user, group int) {
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return -1, -1
	}
	return int(stat.Uid), int(stat.Gid)
}
