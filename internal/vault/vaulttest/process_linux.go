package vaulttest

import "syscall"

// ownProcess has the kernel end Vault when the test process dies without
// stopping it.
func ownProcess() *syscall.SysProcAttr { return &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} }
