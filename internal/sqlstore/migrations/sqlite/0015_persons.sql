-- +goose Up
-- The pseudonyms under which events know persons. A row that is deleted leaves
-- nothing that a guess could be tested against: pseudonyms are random.
CREATE TABLE persons (
    subject   TEXT PRIMARY KEY,
    pseudonym TEXT NOT NULL UNIQUE
);
