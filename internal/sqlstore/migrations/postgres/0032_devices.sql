-- +goose Up
SET LOCAL statement_timeout = 0;
SET LOCAL lock_timeout = '5s';
-- origin: who makes the key, the back end or the node. bind_tpm: empty, the one
-- TPM that may claim it, or 'allowed' for any that the organization allows.
-- challenge: the secret, sealed, from which those of challenges to TPMs are
-- derived. A program that knows none of these must not serve such an
-- enrollment: for it, recipient names one that nobody can be, and bind_recipient
-- has what recipient had.
ALTER TABLE enrollments ADD COLUMN origin TEXT NOT NULL DEFAULT 'backend';
ALTER TABLE enrollments ADD COLUMN bind_tpm TEXT NOT NULL DEFAULT '';
ALTER TABLE enrollments ADD COLUMN bind_recipient TEXT NOT NULL DEFAULT '';
ALTER TABLE enrollments ADD COLUMN challenge BYTEA;

-- ek: the TPM that the recipient, or the node's own key, is in; evidence: why the
-- TPM was believed. Where the node made the key, wrapped is empty, never a key.
ALTER TABLE deliveries ADD COLUMN origin TEXT NOT NULL DEFAULT 'backend';
ALTER TABLE deliveries ADD COLUMN ek TEXT NOT NULL DEFAULT '';
ALTER TABLE deliveries ADD COLUMN evidence TEXT NOT NULL DEFAULT '';

-- What a key that its holder made may not be: one that is there already.
CREATE INDEX deliveries_of_own_keys ON deliveries (recipient) WHERE origin = 'node';
CREATE INDEX deliveries_by_fingerprint ON deliveries (fingerprint) WHERE fingerprint <> '';

-- The TPMs, by their endorsement keys, that may have keys of an organization.
CREATE TABLE devices (
    org_id     TEXT NOT NULL,
    ek         TEXT NOT NULL,
    note       TEXT NOT NULL,
    created_at BIGINT NOT NULL,
    PRIMARY KEY (org_id, ek)
);
