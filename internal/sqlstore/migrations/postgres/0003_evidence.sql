-- +goose Up
SET LOCAL statement_timeout = 0;
SET LOCAL lock_timeout = '5s';
-- Signed checkpoints, verbatim. A superseded one is of a log that was set back
-- since, which an operator accepted.
CREATE TABLE signed_checkpoints (
    seq        BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    size       BIGINT NOT NULL,
    text       TEXT NOT NULL,
    superseded BIGINT NOT NULL DEFAULT 0 CHECK (superseded IN (0, 1))
);

-- The verifier keys of what has signed checkpoints. sealed is the private half
-- of one that no HSM and no Vault holds.
CREATE TABLE checkpoint_keys (
    seq    BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    vkey   TEXT NOT NULL UNIQUE,
    sealed BYTEA
);

-- The public keys that sinks sign receipts with.
CREATE TABLE receipt_keys (
    sink    TEXT NOT NULL,
    version BIGINT NOT NULL,
    public  BYTEA NOT NULL,
    PRIMARY KEY (sink, version)
);

-- Every policy that was in force: the files that its revision is the hash of.
CREATE TABLE policies (
    revision TEXT NOT NULL,
    name     TEXT NOT NULL,
    content  BYTEA NOT NULL,
    PRIMARY KEY (revision, name)
);
