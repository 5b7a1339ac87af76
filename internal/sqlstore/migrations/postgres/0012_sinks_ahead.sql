-- +goose Up
SET LOCAL statement_timeout = 0;
SET LOCAL lock_timeout = '5s';
-- Audit sinks that were found to hold more of the log than there is, or another
-- one, as after a failover that lost events. While one is here no replica gives
-- an event its place. An operator's word (orgkeys audit accept-rollback) ends it,
-- or the sink itself, when it fits again.
CREATE TABLE sinks_ahead (
    holder   TEXT NOT NULL,
    sink     TEXT NOT NULL,
    size     BIGINT NOT NULL,
    found_at BIGINT NOT NULL,
    PRIMARY KEY (holder, sink)
);

-- The timeline of the database under which a replica's sinks were last found to
-- fit the log. NULL: none yet, or the replica's version does not say.
ALTER TABLE replicas ADD COLUMN timeline TEXT;
