ALTER TABLE jobs ADD COLUMN source TEXT;  -- the job whose model this one pushes to the hub; NULL: it prunes
ALTER TABLE jobs ADD COLUMN push TEXT;  -- JSON: how it pushes
ALTER TABLE jobs ADD COLUMN published TEXT;  -- JSON: where the model went
CREATE INDEX jobs_by_source ON jobs (source, seq) WHERE source IS NOT NULL;
