-- +goose Up
SET LOCAL statement_timeout = 0;
SET LOCAL lock_timeout = '5s';
-- The leaf of event_id, once it was moved out of the database, where the node made the key:
-- it may ask for its answer again for as long as the key lives.
ALTER TABLE deliveries ADD COLUMN leaf BYTEA;
