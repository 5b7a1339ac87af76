package main

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/orgkeys/orgkeys/internal/config"
	"github.com/orgkeys/orgkeys/internal/server"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// load reads the settings for a command.
func load(cmd *cobra.Command) (config.Config, error) {
	file, err := cmd.Flags().GetString("config")
	if err != nil {
		return config.Config{}, err
	}
	cfg, err := config.Load(os.Environ(), file)
	if err != nil {
		return config.Config{}, err
	}
	for name, value := range cfg.Libraries {
		if err := os.Setenv(name, value); err != nil { // reaches C libraries too: cgo's runtime passes it on
			return config.Config{}, err
		}
	}
	return cfg, nil
}

// configured is a command that needs the settings.
func configured(do func(cmd *cobra.Command, cfg config.Config, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		cfg, err := load(cmd)
		if err != nil {
			return err
		}
		return do(cmd, cfg, args)
	}
}

// onLog is a command that needs the log that the settings name, too.
func onLog(do func(cmd *cobra.Command, cfg config.Config, db *sqlstore.DB, args []string) error) func(*cobra.Command, []string) error {
	return configured(func(cmd *cobra.Command, cfg config.Config, args []string) error {
		db, err := server.OpenLog(cmd.Context(), cfg)
		if err != nil {
			return err
		}
		return errors.Join(do(cmd, cfg, db, args), db.Close())
	})
}

// settingsHelp lists every setting with its default.
func settingsHelp() string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	for _, s := range config.Settings() {
		doc := s.Doc
		if s.Default != "" {
			doc += " (" + s.Default + ")"
		}
		if s.Secret {
			doc += "; or " + s.Name + "_FILE"
		}
		fmt.Fprintf(w, "  %s\t%s\n", s.Name, doc)
	}
	_ = w.Flush() // a strings.Builder does not fail
	return b.String()
}

func newLogger(cfg config.Config) *slog.Logger {
	var level slog.Level
	_ = level.UnmarshalText([]byte(cfg.LogLevel)) // config has checked it
	return slog.New(slog.NewJSONHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
}
