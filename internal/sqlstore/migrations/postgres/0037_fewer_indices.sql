-- +goose Up
-- 0037 of SQLite lays out tables anew, which PostgreSQL has no need of.
SELECT 1;
