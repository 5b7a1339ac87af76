package server

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/orgkeys/orgkeys/internal/config"
)

// SinkOutside reports whether the file sink is outside the data directory, after
// resolving links.
func SinkOutside(cfg config.Config) (bool, error) {
	dir, err := resolve(cfg.DataDir)
	if err != nil {
		return false, err
	}
	place, err := resolve(cfg.AuditFile)
	if errors.Is(err, os.ErrNotExist) {
		place, err = resolve(filepath.Dir(cfg.AuditFile))
	}
	if errors.Is(err, os.ErrNotExist) {
		return true, nil // and so opening it says
	}
	if err != nil {
		return false, err
	}
	return place != dir && !strings.HasPrefix(place, dir+string(filepath.Separator)), nil
}

func resolve(path string) (string, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	return filepath.EvalSymlinks(path)
}

// OnlySinkInside reports whether the log and all that could vouch for it lie in
// the data directory: then one that is put back as a whole looks like one that
// nothing happened to.
func OnlySinkInside(cfg config.Config) (bool, error) {
	if cfg.DatabaseURL != "" || slices.ContainsFunc(cfg.AuditSinks, func(name string) bool { return name != config.SinkFile }) {
		return false, nil
	}
	outside, err := SinkOutside(cfg)
	return !outside, err
}

// OnlySinkProblem and OnlySinkRemedy are the messages about it.
const (
	OnlySinkProblem = "the only audit sink is in the data directory, with the log: if the whole directory is restored from a backup or rewritten, that is not detected"
	OnlySinkRemedy  = "set ORGKEYS_AUDIT_FILE to a file on another disk, or keep a copy of the sink, or its newest checkpoint, elsewhere"
)

func warnOfOnlySink(cfg config.Config, log *slog.Logger) {
	if inside, err := OnlySinkInside(cfg); err == nil && inside {
		log.Warn(OnlySinkProblem, "remedy", OnlySinkRemedy)
	}
}
