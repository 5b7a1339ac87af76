-- +goose Up
SET LOCAL statement_timeout = 0;
SET LOCAL lock_timeout = '5s';
-- The time that a used signature's line names, which orders the rows of SQLite (0 in rows of
-- earlier versions). Here the primary key stays, by which every version finds a use.
ALTER TABLE signature_uses ADD COLUMN stamp BIGINT NOT NULL DEFAULT 0;
