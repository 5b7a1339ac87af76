-- +goose Up
SET LOCAL statement_timeout = 0;
SET LOCAL lock_timeout = '5s';
-- Which database the log's newest event got its index in: the system that initdb
-- made, and the timeline. NULL: not noted yet, or the database does not tell.
ALTER TABLE log_head ADD COLUMN history TEXT;
