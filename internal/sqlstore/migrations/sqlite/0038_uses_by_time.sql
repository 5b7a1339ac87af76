-- +goose Up
-- Uses ordered by the time that their lines name, which is the same whatever request presents
-- them: by a hash alone each had a page of its own. Of earlier rows it is not known: 0.
CREATE TABLE signature_uses_0038 (
    key_id  TEXT NOT NULL,
    stamp   BIGINT NOT NULL,
    message BLOB NOT NULL,
    request BLOB NOT NULL,
    until   BIGINT NOT NULL,
    PRIMARY KEY (key_id, stamp, message)
) WITHOUT ROWID;
INSERT INTO signature_uses_0038 SELECT key_id, 0, message, request, until FROM signature_uses;
DROP TABLE signature_uses;
ALTER TABLE signature_uses_0038 RENAME TO signature_uses;
CREATE INDEX signature_uses_ending ON signature_uses (until);
