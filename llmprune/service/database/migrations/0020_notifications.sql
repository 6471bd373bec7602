CREATE TABLE notify_targets (
    job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    kind TEXT NOT NULL CHECK (kind IN ('webhook', 'email')),
    target TEXT NOT NULL,
    PRIMARY KEY (job, kind, target)
);

CREATE TABLE notify_defaults (  -- for new jobs that name no targets
    owner TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('webhook', 'email')),
    target TEXT NOT NULL,
    PRIMARY KEY (owner, kind, target)
);

CREATE TABLE outbox (  -- kept when the job is deleted: what has ended is still to be told
    id TEXT PRIMARY KEY,  -- sent along, so that a receiver can drop what comes twice
    job TEXT,  -- NULL: a test
    owner TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('webhook', 'email')),
    target TEXT NOT NULL,
    body TEXT NOT NULL,  -- JSON
    state TEXT NOT NULL CHECK (state IN ('pending', 'delivered', 'given up')),
    tries INTEGER NOT NULL DEFAULT 0,
    error TEXT,  -- of the last try
    created REAL NOT NULL,
    due REAL NOT NULL,  -- when it is tried next
    ended REAL
);
CREATE INDEX outbox_by_state ON outbox (state, due);
CREATE INDEX outbox_by_job ON outbox (job, created);
CREATE INDEX outbox_by_owner ON outbox (owner, state, ended);
