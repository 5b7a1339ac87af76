//go:build !linux

package vaulttest

import "syscall"

func ownProcess() *syscall.SysProcAttr { return nil }
