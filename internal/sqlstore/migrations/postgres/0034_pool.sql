-- +goose Up
SET LOCAL statement_timeout = 0;
SET LOCAL lock_timeout = '5s';
-- Keys made ahead, which wait in the back end and belong to nobody. sealed is NULL
-- while a key is being made, and holds its public half, its time and the mark of the
-- credentials that it was made with. Taking a key deletes its row, in the transaction
-- that reserves a place for it.
CREATE TABLE pool_keys (
    id         TEXT PRIMARY KEY,
    use        TEXT NOT NULL CHECK (use IN ('plain', 'sealed')),
    sealed     BYTEA,
    expires_at BIGINT NOT NULL
);

-- A mark of the credentials that a replica uses for the back end. NULL: it does not say.
ALTER TABLE replicas ADD COLUMN credentials TEXT;

-- Attempts under way, by the name of their key in the back end, for the reaper.
CREATE INDEX deliveries_attempt ON deliveries (attempt) WHERE stage = 'claimed' AND attempt_until IS NOT NULL;

-- The ID that a reservation was asked for under, and keeps when it is for a pool key.
-- NULL: a replica of an older version reserved, or an enrollment did.
ALTER TABLE org_keys ADD COLUMN asked TEXT;
CREATE INDEX org_keys_asked ON org_keys (asked) WHERE state = 'reserved';
