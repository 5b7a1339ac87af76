package client_test

import (
	"os"
	"testing"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

// server is a running orgkeys that the tests and examples share.
var server *harness.Server

func TestMain(m *testing.M) {
	os.Exit(harness.MainServing(m, func(s *harness.Server) { server = s }))
}
