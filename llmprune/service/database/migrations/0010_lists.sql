-- Counts by state of shared jobs, and the job of an idempotency key when a job is deleted, come from an index.
CREATE INDEX shared_jobs_by_state_and_owner ON jobs (state, owner) WHERE shared = 1;
CREATE INDEX idempotency_by_job ON idempotency (job);
