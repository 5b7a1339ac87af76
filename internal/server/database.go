package server

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/orgkeys/orgkeys/internal/config"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// migrateTimeout is for a migration that changes millions of rows, or waits for the
// replica that does.
const migrateTimeout = 10 * time.Minute

// OpenDatabase opens the database and brings its schema up to date.
func OpenDatabase(ctx context.Context, cfg config.Config) (*sqlstore.DB, error) {
	opening, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	db, err := sqlstore.Open(opening, DatabaseLocation(cfg))
	if err != nil {
		return nil, err
	}
	db.LimitConnections(cfg.DatabaseConnections)
	migrating, cancel := context.WithTimeout(ctx, migrateTimeout)
	defer cancel()
	if err := db.Migrate(migrating); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	if err := useArchive(cfg, db); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	return db, nil
}

// OpenLog opens the database that the settings name, without changing it.
func OpenLog(ctx context.Context, cfg config.Config) (*sqlstore.DB, error) {
	if err := isThere(cfg); err != nil {
		return nil, err
	}
	db, err := sqlstore.Open(ctx, DatabaseLocation(cfg))
	if err != nil {
		return nil, err
	}
	if err := errors.Join(db.CheckMigrated(ctx), useArchive(cfg, db)); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	return db, nil
}

// isThere refuses a database of SQLite that opening would make.
func isThere(cfg config.Config) error {
	if cfg.DatabaseURL != "" {
		return nil
	}
	if _, err := os.Stat(DatabaseLocation(cfg)); err != nil {
		return fmt.Errorf("there is no log to read: %w (is ORGKEYS_DATA_DIR right?)", err)
	}
	return nil
}

// DatabaseLocation is the URL or the file of the database that the settings name.
func DatabaseLocation(cfg config.Config) string {
	if cfg.DatabaseURL != "" {
		return cfg.DatabaseURL
	}
	return filepath.Join(cfg.DataDir, "orgkeys.db")
}
