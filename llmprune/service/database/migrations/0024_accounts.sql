-- Tells users of one name apart: the secret that signs a user's webhooks is made from it. Users of before have none, so that
-- their receivers need no other secret.
ALTER TABLE users ADD COLUMN account TEXT NOT NULL DEFAULT '';
ALTER TABLE outbox ADD COLUMN account TEXT NOT NULL DEFAULT '';  -- of the owner when the job ended
