// Package sourcetree finds the repository that a test runs in.
package sourcetree

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// Root is the directory of go.mod, the nearest one above the working directory.
func Root() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("finding go.mod: %w", err)
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return "", errors.New("no directory above the working directory holds go.mod")
		}
		dir = parent
	}
}
