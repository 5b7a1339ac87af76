-- +goose Up
-- Which events of the feed a user has marked as read; seq is events.seq.
CREATE TABLE event_reads (
    org_id TEXT NOT NULL,
    reader TEXT NOT NULL,
    seq    BIGINT NOT NULL,
    PRIMARY KEY (org_id, reader, seq)
) WITHOUT ROWID;
