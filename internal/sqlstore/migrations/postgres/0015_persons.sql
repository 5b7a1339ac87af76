-- +goose Up
SET LOCAL statement_timeout = 0;
SET LOCAL lock_timeout = '5s';
-- The pseudonyms under which events know persons. A row that is deleted leaves
-- nothing that a guess could be tested against: pseudonyms are random.
CREATE TABLE persons (
    subject   TEXT PRIMARY KEY,
    pseudonym TEXT NOT NULL UNIQUE
);
