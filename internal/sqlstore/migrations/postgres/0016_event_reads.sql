-- +goose Up
SET LOCAL statement_timeout = 0;
SET LOCAL lock_timeout = '5s';
-- Which events of the feed a user has marked as read; seq is events.seq.
CREATE TABLE event_reads (
    org_id TEXT NOT NULL,
    reader TEXT NOT NULL,
    seq    BIGINT NOT NULL,
    PRIMARY KEY (org_id, reader, seq)
);
