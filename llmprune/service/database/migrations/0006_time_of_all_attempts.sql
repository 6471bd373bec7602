ALTER TABLE jobs ADD COLUMN ran_before REAL NOT NULL DEFAULT 0;  -- what of ran_seconds was before the last retry: the limit leaves it out
