CREATE TABLE sweeps (
    id TEXT PRIMARY KEY,
    owner TEXT NOT NULL,
    shared INTEGER NOT NULL,
    name TEXT NOT NULL,
    axes TEXT NOT NULL,  -- JSON: list of {key, values}
    created REAL NOT NULL,
    idempotency_key TEXT,
    digest TEXT NOT NULL,  -- of the request
    UNIQUE (owner, idempotency_key)
);
CREATE INDEX sweeps_by_arrival ON sweeps (created, id);

CREATE TABLE sweep_jobs (
    job TEXT PRIMARY KEY REFERENCES jobs (id) ON DELETE CASCADE,
    sweep TEXT NOT NULL REFERENCES sweeps (id) ON DELETE CASCADE,
    place INTEGER NOT NULL,  -- in the order of the values
    point TEXT NOT NULL  -- JSON: list of the value of each key
);
CREATE INDEX sweep_jobs_by_sweep ON sweep_jobs (sweep, place);
