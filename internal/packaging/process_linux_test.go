package packaging

import "syscall"

// dieWithTest keeps servers from outliving a test that is killed.
func dieWithTest() *syscall.SysProcAttr { return &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} }
