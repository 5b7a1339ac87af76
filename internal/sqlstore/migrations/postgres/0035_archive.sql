-- +goose Up
SET LOCAL statement_timeout = 0;
SET LOCAL lock_timeout = '5s';
-- What was moved out of the database, into an archive: the first events of the log,
-- whole entry bundles of 256; and of the archive, by the policy of retention, removed,
-- the first entries again. moved_by and removed_by are the IDs of the events that say
-- so, next_move and next_removal of those that announce what comes next.
CREATE TABLE log_archive (
    one          BIGINT PRIMARY KEY CHECK (one = 1),
    moved        BIGINT NOT NULL,
    moved_by     TEXT NOT NULL,
    next_move    TEXT NOT NULL,
    removed      BIGINT NOT NULL,
    removed_by   TEXT NOT NULL,
    next_removal TEXT NOT NULL,
    CHECK (moved >= removed AND moved % 256 = 0 AND removed % 256 = 0)
);
INSERT INTO log_archive VALUES (1, 0, '', '', 0, '', '');

-- What a bundle's events knew of people, which is no part of an archive: of each the
-- actor and the personal part, packed.
CREATE TABLE archived_persons (
    bundle  BIGINT PRIMARY KEY,
    content BYTEA NOT NULL
);

-- The actor of an event that was moved, where a key's delivery needs its personal part.
ALTER TABLE event_persons ADD COLUMN actor TEXT NOT NULL DEFAULT '';
