-- +goose Up
SET LOCAL statement_timeout = 0;
SET LOCAL lock_timeout = '5s';
-- Which keys in the HSM's token are in use, by their CKA_ID in hex: one for each
-- purpose, chosen by the first start that asks. A key is announced before it is
-- made, so that what a crash leaves can be told from what somebody put there.
CREATE TABLE token_keys (
    purpose TEXT PRIMARY KEY,
    cka_id  TEXT NOT NULL
);
CREATE TABLE token_keys_announced (
    purpose TEXT NOT NULL,
    cka_id  TEXT NOT NULL,
    PRIMARY KEY (purpose, cka_id)
);
