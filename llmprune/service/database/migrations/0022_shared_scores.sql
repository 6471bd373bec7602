CREATE TABLE shared_scores (  -- jobs of a sweep that need the same scores
    job TEXT PRIMARY KEY REFERENCES jobs (id) ON DELETE CASCADE,
    score_group TEXT NOT NULL
);
CREATE INDEX shared_scores_by_group ON shared_scores (score_group);
