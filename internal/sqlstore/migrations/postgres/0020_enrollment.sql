-- +goose Up
SET LOCAL statement_timeout = 0;
SET LOCAL lock_timeout = '5s';
-- Keys that belong to one node each. They are apart from org_keys, so that a
-- program that does not know them takes none for an organization's. address is
-- the only one that the key may speak for until it belongs to a node.
CREATE TABLE keys_of_nodes (
    id           TEXT PRIMARY KEY,
    org_id       TEXT NOT NULL,
    slot         BIGINT CHECK (slot >= 1),
    state        TEXT NOT NULL CHECK (state IN ('reserved', 'pending', 'released', 'deleted')),
    sealed       BYTEA,
    expires_at   BIGINT,
    created_at   BIGINT,
    released_at  BIGINT,
    delivered_at BIGINT,
    deleted_at   BIGINT,
    last_used_at BIGINT,
    node_id      TEXT,
    address      TEXT,
    UNIQUE (org_id, slot),
    CHECK ((state = 'deleted') = (slot IS NULL)),
    CHECK ((state IN ('pending', 'released')) = (sealed IS NOT NULL)),
    CHECK ((state IN ('reserved', 'pending')) = (expires_at IS NOT NULL))
);
CREATE INDEX keys_of_nodes_expiring ON keys_of_nodes (expires_at) WHERE expires_at IS NOT NULL;
CREATE INDEX keys_of_nodes_by_address ON keys_of_nodes (org_id, address) WHERE address IS NOT NULL;
CREATE INDEX keys_of_nodes_by_node ON keys_of_nodes (node_id) WHERE node_id IS NOT NULL;

-- An administrator's permission for nodes to have a key. secret is the token's,
-- sealed; recipient the only one that may claim it, or empty; ended_at when it
-- was revoked, or what was not claimed was given back.
CREATE TABLE enrollments (
    id         TEXT PRIMARY KEY,
    org_id     TEXT NOT NULL,
    scope      TEXT NOT NULL CHECK (scope IN ('node', 'organization')),
    uses       BIGINT NOT NULL CHECK (uses >= 1),
    recipient  TEXT NOT NULL,
    approval   BIGINT NOT NULL CHECK (approval IN (0, 1)),
    address    TEXT NOT NULL,
    note       TEXT NOT NULL,
    secret     BYTEA NOT NULL,
    created_at BIGINT NOT NULL,
    expires_at BIGINT NOT NULL,
    revoked_at BIGINT,
    ended_at   BIGINT,
    conflicts  BIGINT NOT NULL DEFAULT 0
);
CREATE INDEX enrollments_by_org ON enrollments (org_id, created_at);
CREATE INDEX enrollments_ending ON enrollments (expires_at) WHERE ended_at IS NULL;

-- Recipients that wanted what another has.
CREATE TABLE enrollment_conflicts (
    enrollment_id TEXT NOT NULL,
    recipient     TEXT NOT NULL,
    PRIMARY KEY (enrollment_id, recipient)
);

-- A sealed key on its way to one recipient. key_id is the key that has the
-- place in the quota; enrollment_id is empty for an administrator's own.
CREATE TABLE deliveries (
    key_id        TEXT PRIMARY KEY,
    org_id        TEXT NOT NULL,
    enrollment_id TEXT NOT NULL,
    scope         TEXT NOT NULL CHECK (scope IN ('node', 'organization')),
    stage         TEXT NOT NULL CHECK (stage IN ('open', 'claimed', 'stored', 'sealed', 'available', 'received', 'ended')),
    recipient     TEXT,
    recipient_key BYTEA,
    claimed_from  TEXT NOT NULL DEFAULT '',
    claimed_at    BIGINT,
    approved_at   BIGINT,
    attempt       TEXT NOT NULL DEFAULT '',
    attempt_until BIGINT,
    alg           TEXT NOT NULL DEFAULT '',
    wrapped       BYTEA,
    digest        TEXT NOT NULL DEFAULT '',
    fingerprint   TEXT NOT NULL DEFAULT '',
    event_id      TEXT NOT NULL DEFAULT '',
    until         BIGINT,
    answers       BIGINT NOT NULL DEFAULT 0,
    used_at       BIGINT,
    received_at   BIGINT,
    CHECK ((stage = 'open') = (recipient IS NULL) OR stage = 'ended'),
    CHECK ((stage IN ('stored', 'sealed', 'available')) = (wrapped IS NOT NULL))
);
CREATE UNIQUE INDEX deliveries_by_recipient ON deliveries (enrollment_id, recipient) WHERE enrollment_id <> '' AND recipient IS NOT NULL;
CREATE UNIQUE INDEX deliveries_own ON deliveries (org_id, recipient) WHERE enrollment_id = '' AND stage NOT IN ('received', 'ended');
CREATE INDEX deliveries_by_enrollment ON deliveries (enrollment_id);
CREATE INDEX deliveries_until ON deliveries (until) WHERE stage NOT IN ('open', 'received', 'ended');
