-- +goose Up
SET LOCAL statement_timeout = 0;
SET LOCAL lock_timeout = '5s';
-- Who is signed in to the console. id is derived from the browser's cookie, and
-- sealed holds the access token under a key that only the cookie gives; holder is
-- a digest of organization and subject, to bound the sessions of one person.
CREATE TABLE console_sessions (
    id         TEXT PRIMARY KEY,
    holder     TEXT NOT NULL,
    sealed     BYTEA NOT NULL,
    created_at BIGINT NOT NULL,
    expires_at BIGINT NOT NULL
);
CREATE INDEX console_sessions_of_holder ON console_sessions (holder, created_at);
CREATE INDEX console_sessions_ending ON console_sessions (expires_at);

-- What waits for its receipt, of one organization.
CREATE INDEX deliveries_of_org ON deliveries (org_id, stage);

-- An organization's part of the log, newest first: all of it, or about one object.
-- Without the time: with it SQLite takes this for events_changes.
CREATE INDEX events_of_org ON events (org_id, seq);
CREATE INDEX events_of_object ON events (org_id, object, seq) WHERE object <> '';
