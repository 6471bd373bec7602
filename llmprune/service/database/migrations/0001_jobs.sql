CREATE TABLE jobs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,  -- the order of arrival, whatever the clock says
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    name TEXT NOT NULL,
    model TEXT NOT NULL,
    recipe TEXT NOT NULL,
    overrides TEXT NOT NULL,  -- JSON list of section.key=value
    launcher TEXT NOT NULL,
    gpus INTEGER NOT NULL,
    priority INTEGER NOT NULL,
    time_limit REAL,  -- seconds of running, over all attempts
    state TEXT NOT NULL CHECK (state IN ('queued', 'running', 'cancelling', 'cancelled', 'failed', 'succeeded')),
    attempts INTEGER NOT NULL DEFAULT 0,
    devices TEXT NOT NULL DEFAULT '[]',  -- JSON list of the GPUs it holds while it runs
    step TEXT,
    done INTEGER,
    total INTEGER,
    fraction REAL NOT NULL DEFAULT 0,
    seconds_left REAL,  -- of the step
    ran_seconds REAL NOT NULL DEFAULT 0,
    exit_code INTEGER,
    error TEXT,
    figures TEXT,  -- JSON, from its report
    cleaned INTEGER NOT NULL DEFAULT 0,  -- 1: the clean-up has taken its model
    created REAL NOT NULL,
    started REAL,
    finished REAL
);
CREATE INDEX jobs_by_state ON jobs (state, priority DESC, seq);
CREATE INDEX jobs_by_owner ON jobs (owner, state);

CREATE TABLE events (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    kind TEXT NOT NULL,
    data TEXT NOT NULL,
    at REAL NOT NULL
);
CREATE INDEX events_by_job ON events (job, id);

CREATE TABLE idempotency (
    owner TEXT NOT NULL,
    key TEXT NOT NULL,
    digest TEXT NOT NULL,  -- of the request
    job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    PRIMARY KEY (owner, key)
) WITHOUT ROWID;

CREATE TABLE heartbeat (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    monotonic REAL NOT NULL,  -- seconds since the machine started
    "full" INTEGER NOT NULL  -- 1: the disk quota is used up
);
