package main

import (
	"os"
	"testing"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

func TestMain(m *testing.M) { os.Exit(harness.Main(m)) }
