-- The model library: a row for each job with a result, copied from the job's row, and its labels. Lists read this table
-- alone, because rows of jobs are wide. Sort keys are never NULL: -1 stands for a figure that was not measured.
CREATE TABLE models (
    job TEXT PRIMARY KEY REFERENCES jobs (id) ON DELETE CASCADE,
    seq BIGINT NOT NULL,  -- of the job
    owner TEXT NOT NULL,
    shared INTEGER NOT NULL,
    name TEXT NOT NULL,  -- lower case
    base TEXT NOT NULL,  -- the model that was pruned
    parameters BIGINT NOT NULL,
    bytes BIGINT NOT NULL,
    size REAL NOT NULL,  -- share of the dense model's bytes
    retention REAL NOT NULL,
    speed REAL NOT NULL,  -- tokens per second, pruned / dense
    finished REAL NOT NULL,
    stage TEXT NOT NULL DEFAULT 'candidate' CHECK (stage IN ('candidate', 'approved', 'retired')),
    tags TEXT NOT NULL DEFAULT '',  -- sorted, separated by spaces; model_tags has them one by one
    words TEXT NOT NULL,  -- name, base and id in lower case, for the search
    label_words TEXT NOT NULL DEFAULT '',  -- tags and notes in lower case, for the search
    notes TEXT NOT NULL DEFAULT ''
);
-- One index for each order of a list. It holds owner and shared too, so that other users' rows are skipped without a look at them.
CREATE INDEX models_by_name ON models (name, seq, owner, shared);
CREATE INDEX models_by_base ON models (base, seq, owner, shared);
CREATE INDEX models_by_parameters ON models (parameters, seq, owner, shared);
CREATE INDEX models_by_bytes ON models (bytes, seq, owner, shared);
CREATE INDEX models_by_size ON models (size, seq, owner, shared);
CREATE INDEX models_by_retention ON models (retention, seq, owner, shared);
CREATE INDEX models_by_speed ON models (speed, seq, owner, shared);
CREATE INDEX models_by_finished ON models (finished, seq, owner, shared);
CREATE INDEX models_by_stage ON models (stage, seq, owner, shared);
CREATE INDEX models_by_owner ON models (owner, seq, shared);

CREATE TABLE model_tags (
    tag TEXT NOT NULL,
    job TEXT NOT NULL REFERENCES models (job) ON DELETE CASCADE,
    PRIMARY KEY (tag, job)
);
CREATE INDEX model_tags_by_job ON model_tags (job);
-- Jobs with a result; the service looks here for those that the library lacks. Jobs of one base, for links between models.
CREATE INDEX jobs_with_figures ON jobs (seq) WHERE figures IS NOT NULL AND source IS NULL;
CREATE INDEX jobs_by_model ON jobs (model, seq);
ALTER TABLE jobs ADD COLUMN uploaded INTEGER NOT NULL DEFAULT 0;  -- 1: a run folder that a user uploaded, not made by this service
CREATE INDEX uploaded_jobs ON jobs (id) WHERE uploaded = 1;
