-- A gate that is not met or undecided is a result, not a failure. SQLite changes no CHECK, so the column is made anew.
DROP INDEX jobs_by_state;
DROP INDEX jobs_by_owner;
DROP INDEX jobs_by_state_and_arrival;
DROP INDEX shared_jobs_by_state;
ALTER TABLE jobs ADD COLUMN new_state TEXT NOT NULL DEFAULT 'queued' CHECK (new_state IN (
    'queued', 'running', 'cancelling', 'cancelled', 'failed', 'gate_not_met', 'gate_undecided', 'succeeded'
));
UPDATE jobs SET new_state = CASE
    WHEN state = 'failed' AND exit_code = 3 AND figures IS NOT NULL
    THEN CASE WHEN error LIKE '%the gate is undecided%' THEN 'gate_undecided' ELSE 'gate_not_met' END
    ELSE state
END;
ALTER TABLE jobs DROP COLUMN state;
ALTER TABLE jobs RENAME COLUMN new_state TO state;
CREATE INDEX jobs_by_state ON jobs (state, priority DESC, seq);
CREATE INDEX jobs_by_owner ON jobs (owner, state);
CREATE INDEX jobs_by_state_and_arrival ON jobs (state, seq);
CREATE INDEX shared_jobs_by_state ON jobs (state, seq) WHERE shared = 1;
ALTER TABLE jobs ADD COLUMN reevaluate INTEGER;  -- samples a task for its finished model; NULL: the recipe is run
-- An infinite perplexity was stored as null, and no other one was.
UPDATE jobs SET figures = json_set(figures, '$.perplexity[0]', 'Infinity')
WHERE json_valid(figures) AND json_type(figures, '$.perplexity[0]') = 'null';
UPDATE jobs SET figures = json_set(figures, '$.perplexity[1]', 'Infinity')
WHERE json_valid(figures) AND json_type(figures, '$.perplexity[1]') = 'null';
