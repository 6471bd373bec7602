-- Users own jobs, and have any number of tokens. Each token of before becomes a user of its name with one token.
ALTER TABLE tokens RENAME TO tokens_before;
ALTER TABLE sessions RENAME TO sessions_before;
CREATE TABLE users (
    name TEXT PRIMARY KEY,
    role TEXT NOT NULL CHECK (role IN ('viewer', 'user', 'approver', 'admin')),
    email TEXT,  -- in lower case
    subject TEXT UNIQUE,  -- issuer and subject of the OpenID provider; NULL: has never signed in there
    disabled INTEGER NOT NULL DEFAULT 0,
    created REAL NOT NULL,
    seen REAL  -- the last request, to within minutes
);
CREATE TABLE tokens (
    id TEXT PRIMARY KEY,
    owner TEXT NOT NULL REFERENCES users (name) ON DELETE CASCADE,
    name TEXT NOT NULL,
    digest TEXT NOT NULL UNIQUE,  -- SHA-256 of the token, which itself is kept nowhere
    scopes TEXT NOT NULL,  -- separated by spaces
    created REAL NOT NULL,
    expires REAL,  -- NULL: never
    used REAL,  -- to within minutes
    UNIQUE (owner, name)
);
CREATE TABLE sessions (
    id TEXT PRIMARY KEY,
    digest TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL REFERENCES users (name) ON DELETE CASCADE,
    token TEXT REFERENCES tokens (id) ON DELETE CASCADE,  -- NULL: signed in at the OpenID provider
    browser TEXT NOT NULL DEFAULT '',
    created REAL NOT NULL,
    expires REAL NOT NULL
);
CREATE INDEX sessions_by_owner ON sessions (owner, created);
INSERT INTO users (name, role, created) SELECT name, role, created FROM tokens_before;
INSERT INTO tokens (id, owner, name, digest, scopes, created)
SELECT substr(digest, 1, 12), name, 'first', digest, 'read submit manage approve account admin', created
FROM tokens_before;
INSERT INTO sessions (id, digest, owner, token, created, expires)
SELECT substr(s.digest, 1, 12), s.digest, s.token, substr(t.digest, 1, 12), s.expires - 43200, s.expires
FROM sessions_before s JOIN tokens_before t ON t.name = s.token;
-- Owners of jobs whose token was revoked keep their name. With no token at all the service stays open to its machine.
INSERT INTO users (name, role, created)
SELECT owner, 'user', min(created) FROM jobs
WHERE owner <> 'local' AND EXISTS (SELECT 1 FROM tokens_before)
AND NOT EXISTS (SELECT 1 FROM tokens_before t WHERE t.name = owner)
GROUP BY owner;
DROP TABLE sessions_before;
DROP TABLE tokens_before;

-- Values of one user in place of the service's: NULL is the service's, -1 is no limit.
CREATE TABLE user_quotas (
    owner TEXT PRIMARY KEY REFERENCES users (name) ON DELETE CASCADE,
    queued INTEGER,
    running INTEGER,
    gpus INTEGER,
    disk INTEGER,  -- bytes
    per_day INTEGER,
    kept INTEGER
);
-- Submissions by day, deleted jobs included.
CREATE TABLE submitted_jobs (
    owner TEXT NOT NULL,
    day INTEGER NOT NULL,  -- days since 1970, UTC
    number INTEGER NOT NULL,
    PRIMARY KEY (owner, day)
);
-- Disk space of each job's folder, with the state in which it was measured.
CREATE TABLE job_disk (
    job TEXT PRIMARY KEY REFERENCES jobs (id) ON DELETE CASCADE,
    bytes INTEGER NOT NULL,
    state TEXT NOT NULL,
    attempts INTEGER NOT NULL
);

-- Which owner's job started last, for the turns of owners in the queue.
CREATE TABLE last_starts (
    owner TEXT PRIMARY KEY,
    number INTEGER NOT NULL  -- among all starts
);
