ALTER TABLE jobs ADD COLUMN made_from TEXT;  -- the job whose products this one uses
CREATE INDEX jobs_by_made_from ON jobs (made_from, seq) WHERE made_from IS NOT NULL;
