-- +goose Up
-- Names in the back end under which a process that died may have left something that no list
-- there shows. due_at is when they have certainly died.
CREATE TABLE key_traces (
    name     TEXT PRIMARY KEY,
    use      TEXT NOT NULL CHECK (use IN ('plain', 'sealed')),
    due_at   BIGINT NOT NULL
) WITHOUT ROWID;
