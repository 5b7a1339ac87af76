-- +goose Up
-- Times are microseconds since the epoch. A key's place in its organization's
-- quota is its slot; UNIQUE (org_id, slot) is the constraint that decides.
CREATE TABLE org_keys (
    id           TEXT PRIMARY KEY,
    org_id       TEXT NOT NULL,
    slot         BIGINT CHECK (slot >= 1),
    state        TEXT NOT NULL CHECK (state IN ('reserved', 'pending', 'released', 'deleted')),
    sealed       BLOB,
    expires_at   BIGINT,
    created_at   BIGINT,
    released_at  BIGINT,
    delivered_at BIGINT,
    deleted_at   BIGINT,
    last_used_at BIGINT,
    UNIQUE (org_id, slot),
    CHECK ((state = 'deleted') = (slot IS NULL)),
    CHECK ((state IN ('pending', 'released')) = (sealed IS NOT NULL)),
    CHECK ((state IN ('reserved', 'pending')) = (expires_at IS NOT NULL))
);
CREATE INDEX org_keys_expiring ON org_keys (expires_at) WHERE expires_at IS NOT NULL;

-- Events in the order they were recorded; idx is their place in the log, NULL
-- until the sequencer has given it. Every other column repeats the leaf, for
-- queries; "audit verify" compares them.
CREATE TABLE events (
    seq         INTEGER PRIMARY KEY AUTOINCREMENT,
    idx         BIGINT UNIQUE,
    id          TEXT NOT NULL UNIQUE,
    occurred_at BIGINT NOT NULL,
    type        TEXT NOT NULL,
    org_id      TEXT NOT NULL,
    actor       TEXT NOT NULL,
    object      TEXT NOT NULL,
    leaf        BLOB NOT NULL
);
CREATE INDEX events_unsequenced ON events (seq) WHERE idx IS NULL;
CREATE INDEX events_by_org ON events (org_id, occurred_at);

-- What events know of people, apart from the log so that it can be erased.
CREATE TABLE event_persons (
    event_id TEXT PRIMARY KEY,
    personal BLOB NOT NULL
);

-- The Merkle tree, as golang.org/x/mod/sumdb/tlog numbers stored hashes.
CREATE TABLE log_hashes (
    idx  BIGINT PRIMARY KEY,
    hash BLOB NOT NULL
);
CREATE TABLE log_head (
    one    BIGINT PRIMARY KEY CHECK (one = 1),
    origin TEXT NOT NULL,
    size   BIGINT NOT NULL,
    root   BLOB NOT NULL
);

-- What sinks that sign returned for the events they got.
CREATE TABLE event_receipts (
    sink    TEXT NOT NULL,
    idx     BIGINT NOT NULL,
    receipt BLOB NOT NULL,
    PRIMARY KEY (sink, idx)
);

-- How far the sinks are that all replicas share.
CREATE TABLE sink_progress (
    sink TEXT PRIMARY KEY,
    next BIGINT NOT NULL
);
