-- The draft of each user's next job, until it is submitted.
CREATE TABLE drafts (
    owner TEXT PRIMARY KEY,
    recipe TEXT NOT NULL,
    settings TEXT NOT NULL,  -- JSON: the other fields of the page
    saved REAL NOT NULL
);
CREATE INDEX drafts_by_time ON drafts (saved);
