package server

import (
	"log/slog"
	"os"
	"os/signal"
	"syscall"
)

// outliveHangups keeps SIGHUP from ending the process, until the function that it
// returns is called. There is nothing to reload: certificates, policies, issuers,
// token keys and credentials are read again when their files change, and settings are what
// the process started with.
func outliveHangups(log *slog.Logger) (stop func() error) {
	asked := make(chan os.Signal, 1)
	signal.Notify(asked, syscall.SIGHUP)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range asked {
			log.Info("SIGHUP is ignored: files are read again when they change, settings at the next start")
		}
	}()
	return func() error {
		signal.Stop(asked)
		close(asked)
		<-done
		return nil
	}
}
