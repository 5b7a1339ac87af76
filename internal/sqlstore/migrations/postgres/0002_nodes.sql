-- +goose Up
SET LOCAL statement_timeout = 0;
SET LOCAL lock_timeout = '5s';
-- A node is its IP within its organization, and stays when it is deleted:
-- registering again brings it back.
CREATE TABLE nodes (
    id            TEXT PRIMARY KEY,
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
    UNIQUE (org_id, ip)
);

-- Which node registered with which key.
CREATE TABLE node_keys (
    node_id TEXT NOT NULL,
    key_id  TEXT NOT NULL,
    PRIMARY KEY (node_id, key_id)
);
CREATE INDEX node_keys_by_key ON node_keys (key_id);

-- Uses of signatures: message is SHA-256 of the signed line, request of the
-- endpoint and the decoded fields.
CREATE TABLE signature_uses (
    key_id  TEXT NOT NULL,
    message BYTEA NOT NULL,
    request BYTEA NOT NULL,
    until   BIGINT NOT NULL,
    PRIMARY KEY (key_id, message)
);
CREATE INDEX signature_uses_ending ON signature_uses (until);

CREATE TABLE boot_secrets (
    org_id     TEXT NOT NULL,
    name       TEXT NOT NULL,
    sealed     BYTEA NOT NULL,
    created_at BIGINT NOT NULL,
    updated_at BIGINT NOT NULL,
    PRIMARY KEY (org_id, name)
);
