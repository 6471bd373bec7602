ALTER TABLE jobs ADD COLUMN detail TEXT;  -- how the step stands, in words
