ALTER TABLE jobs ADD COLUMN made_from TEXT;  -- the job whose page or command asked for this one; NULL: none
ALTER TABLE jobs ADD COLUMN reads TEXT;  -- the job whose run folder it reads while it waits and runs
ALTER TABLE jobs ADD COLUMN work TEXT;  -- JSON: kind of work and its settings; NULL: it runs its recipe
CREATE INDEX jobs_by_made_from ON jobs (made_from, seq) WHERE made_from IS NOT NULL;
CREATE INDEX jobs_by_reads ON jobs (reads, state) WHERE reads IS NOT NULL;
