//go:build !linux

package packaging

import "syscall"

func dieWithTest() *syscall.SysProcAttr { return nil }
