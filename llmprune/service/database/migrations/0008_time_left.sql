ALTER TABLE jobs ADD COLUMN run_seconds_left REAL;  -- of the whole run
