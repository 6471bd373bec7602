-- As for SQLite, without the conversion of old figures: no earlier version used PostgreSQL.
ALTER TABLE jobs DROP COLUMN state;
ALTER TABLE jobs ADD COLUMN state TEXT NOT NULL DEFAULT 'queued' CHECK (state IN (
    'queued', 'running', 'cancelling', 'cancelled', 'failed', 'gate_not_met', 'gate_undecided', 'succeeded'
));
CREATE INDEX jobs_by_state ON jobs (state, priority DESC, seq);
CREATE INDEX jobs_by_state_and_arrival ON jobs (state, seq);
CREATE INDEX shared_jobs_by_state ON jobs (state, seq) WHERE shared = 1;
DROP INDEX IF EXISTS jobs_by_owner;
CREATE INDEX jobs_by_owner ON jobs (owner, state);
ALTER TABLE jobs ADD COLUMN reevaluate BIGINT;  -- samples a task for its finished model; NULL: the recipe is run
