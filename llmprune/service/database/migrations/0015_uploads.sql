CREATE TABLE uploads (
    id TEXT PRIMARY KEY,  -- that of the job which it becomes; its files are in that job's folder
    owner TEXT NOT NULL,
    digest TEXT NOT NULL,  -- of the request
    request TEXT NOT NULL,  -- JSON: files, name and labels
    changed REAL NOT NULL,  -- when bytes last arrived
    UNIQUE (owner, digest)
);
