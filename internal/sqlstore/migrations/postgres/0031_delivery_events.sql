-- +goose Up
SET LOCAL statement_timeout = 0;
SET LOCAL lock_timeout = '5s';
-- The event of a key's first delivery: where it went is that event's personal
-- part, which can be erased.
ALTER TABLE org_keys ADD COLUMN delivery_event TEXT;
ALTER TABLE keys_of_nodes ADD COLUMN delivery_event TEXT;
UPDATE org_keys SET delivery_event = (SELECT max(e.id) FROM events e
    WHERE e.org_id = org_keys.org_id AND e.type = 'orgkey.delivered' AND e.object = org_keys.id) WHERE state = 'released' AND delivered_at IS NOT NULL;
UPDATE keys_of_nodes SET delivery_event = (SELECT max(e.id) FROM events e
    WHERE e.org_id = keys_of_nodes.org_id AND e.type = 'orgkey.delivered' AND e.object = keys_of_nodes.id) WHERE state = 'released' AND delivered_at IS NOT NULL;
