-- +goose Up
SET LOCAL statement_timeout = 0;
SET LOCAL lock_timeout = '5s';
-- What each replica says of itself every few seconds, for orgkeys doctor.
-- clock_ahead is how far its clock is ahead of the database's, in microseconds.
CREATE TABLE replicas (
    id          TEXT PRIMARY KEY,
    address     TEXT NOT NULL,
    version     TEXT NOT NULL,
    policy      TEXT NOT NULL,
    max_keys    BIGINT NOT NULL,
    clock_ahead BIGINT NOT NULL,
    seen_at     BIGINT NOT NULL
);
