-- +goose Up
-- What POST /systemevent asks of events: changes only, one organization at a
-- time, newest first, by conditions that this index alone can check. Nothing
-- else asks by organization.
SET LOCAL statement_timeout = 0;
SET LOCAL lock_timeout = '5s';
ALTER TABLE events ADD COLUMN reason TEXT NOT NULL DEFAULT '';
ALTER TABLE events ADD COLUMN actor_kind TEXT NOT NULL DEFAULT '';
UPDATE events SET reason = coalesce(convert_from(leaf, 'UTF8')::jsonb ->> 'reason', ''), actor_kind = coalesce(convert_from(leaf, 'UTF8')::jsonb ->> 'actorKind', '');
DROP INDEX events_by_org;
CREATE INDEX events_changes ON events (org_id, occurred_at, seq, type, reason, actor_kind, actor, object)
    WHERE type IN ('orgkey.created', 'orgkey.delivered', 'orgkey.withdrawn', 'orgkey.deleted', 'node.registered', 'node.unregistered', 'node.deleted');
