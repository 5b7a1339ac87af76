-- +goose Up
-- The same columns and constraints in fewer trees. A table whose key is no INTEGER PRIMARY KEY
-- is two of them, the rows and the key's index, unless it is WITHOUT ROWID; a
-- registration wrote each of these twice.
CREATE TABLE log_hashes_0037 (
    idx  INTEGER PRIMARY KEY,
    hash BLOB NOT NULL
);
INSERT INTO log_hashes_0037 SELECT idx, hash FROM log_hashes ORDER BY idx;
DROP TABLE log_hashes;
ALTER TABLE log_hashes_0037 RENAME TO log_hashes;

CREATE TABLE event_persons_0037 (
    event_id TEXT PRIMARY KEY,
    personal BLOB NOT NULL,
    actor    TEXT NOT NULL DEFAULT ''
) WITHOUT ROWID;
INSERT INTO event_persons_0037 SELECT event_id, personal, actor FROM event_persons ORDER BY event_id;
DROP TABLE event_persons;
ALTER TABLE event_persons_0037 RENAME TO event_persons;

CREATE TABLE nodes_0037 (
    id            TEXT NOT NULL UNIQUE,
    org_id        TEXT NOT NULL,
    ip            TEXT NOT NULL,
    region        TEXT NOT NULL,
    version       TEXT NOT NULL,
    status        TEXT NOT NULL,
    url           TEXT NOT NULL,
    provider      TEXT NOT NULL,
    services      BIGINT NOT NULL,
    registered_at BIGINT NOT NULL,
    updated_at    BIGINT NOT NULL,
    seen_at       BIGINT NOT NULL,
    deleted_at    BIGINT,
    PRIMARY KEY (org_id, ip)
) WITHOUT ROWID;
INSERT INTO nodes_0037 SELECT id, org_id, ip, region, version, status, url, provider, services, registered_at, updated_at, seen_at, deleted_at
    FROM nodes ORDER BY org_id, ip;
DROP TABLE nodes;
ALTER TABLE nodes_0037 RENAME TO nodes;

-- Asked by key, or by both: a node's keys are found by its organization.
CREATE TABLE node_keys_0037 (
    node_id TEXT NOT NULL,
    key_id  TEXT NOT NULL,
    PRIMARY KEY (key_id, node_id)
) WITHOUT ROWID;
INSERT INTO node_keys_0037 SELECT node_id, key_id FROM node_keys ORDER BY key_id, node_id;
DROP TABLE node_keys;
ALTER TABLE node_keys_0037 RENAME TO node_keys;
