-- +goose Up
-- A row bears the MAC of its leaf until it has an index. One whose MAC is wrong
-- is refused, and stays. Rows that have an index already need none. There is no
-- default: the version before this one cannot record events, and so does nothing,
-- rather than record events that are refused.
SET LOCAL statement_timeout = 0;
SET LOCAL lock_timeout = '5s';
ALTER TABLE events ADD COLUMN mac BYTEA NOT NULL DEFAULT '';
ALTER TABLE events ALTER COLUMN mac DROP DEFAULT;
ALTER TABLE events ADD COLUMN refused BIGINT NOT NULL DEFAULT 0;
DROP INDEX events_unsequenced;
CREATE INDEX events_waiting ON events (seq) WHERE idx IS NULL AND refused = 0;
CREATE INDEX events_refused ON events (seq) WHERE refused = 1;

-- The key of the MACs, sealed, by the log's origin.
CREATE TABLE event_keys (
    origin TEXT PRIMARY KEY,
    sealed BYTEA NOT NULL
);
