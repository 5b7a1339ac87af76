-- +goose Up
SET LOCAL statement_timeout = 0;
SET LOCAL lock_timeout = '5s';
-- 0037 of SQLite lays out tables anew, which PostgreSQL has no need of.
SELECT 1;
