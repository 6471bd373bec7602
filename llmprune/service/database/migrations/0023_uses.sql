-- Files of a job that another job needs until it has ended. That job may be deleted afterwards, so it is no reference.
CREATE TABLE uses (
    job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    used TEXT NOT NULL,
    part TEXT NOT NULL CHECK (part IN ('model', 'scores', 'run')),
    PRIMARY KEY (job, used)
) WITHOUT ROWID;
CREATE INDEX uses_by_used ON uses (used);
INSERT INTO uses (job, used, part) SELECT id, source, 'run' FROM jobs WHERE source IS NOT NULL;
INSERT INTO uses (job, used, part)
    SELECT id, reads, CASE WHEN work IS NULL OR work LIKE '{"kind":"size"%' THEN 'scores' ELSE 'run' END
    FROM jobs WHERE reads IS NOT NULL AND source IS NULL;
INSERT INTO uses (job, used, part)
    SELECT job, base, 'model' FROM bases WHERE TRUE ON CONFLICT DO NOTHING;
DROP TABLE bases;
DROP INDEX jobs_by_reads;
ALTER TABLE jobs DROP COLUMN reads;
-- Jobs of the service's machine whose files are in the artefact store while jobs on other machines need them.
CREATE TABLE lent_artifacts (
    job TEXT PRIMARY KEY REFERENCES jobs (id) ON DELETE CASCADE
);
-- Ended jobs that may have a model to clean up, by their age.
CREATE INDEX jobs_to_clean ON jobs (finished) WHERE cleaned = 0 AND source IS NULL AND finished IS NOT NULL;
