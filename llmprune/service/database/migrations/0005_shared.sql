ALTER TABLE jobs ADD COLUMN shared INTEGER NOT NULL DEFAULT 0;  -- 1: everybody with a token may read it
-- A list has the caller's jobs and the shared ones, merged in the order of arrival; each half comes from an index.
CREATE INDEX shared_jobs_by_arrival ON jobs (seq) WHERE shared = 1;
CREATE INDEX shared_jobs_by_state ON jobs (state, seq) WHERE shared = 1;
