CREATE INDEX shared_jobs_by_state_and_owner ON jobs (state, owner) WHERE shared = 1;
CREATE INDEX idempotency_by_job ON idempotency (job);
-- Search for a part of a name by trigrams; without the right to make the extension every row is read instead.
DO $$
BEGIN
    CREATE EXTENSION IF NOT EXISTS pg_trgm;
    CREATE INDEX jobs_by_text ON jobs USING gin (name gin_trgm_ops, model gin_trgm_ops);
EXCEPTION
    WHEN OTHERS THEN RAISE NOTICE 'no index for the search: %', SQLERRM;
END
$$;
