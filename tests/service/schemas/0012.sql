BEGIN TRANSACTION;
CREATE TABLE events (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    kind TEXT NOT NULL,
    data TEXT NOT NULL,
    at REAL NOT NULL
);
INSERT INTO "events" VALUES(1,'000000000000','state','{"id": "000000000000", "state": "queued"}',1700000000.0);
INSERT INTO "events" VALUES(2,'000000000001','state','{"id": "000000000001", "state": "running"}',1700000000.0);
INSERT INTO "events" VALUES(3,'000000000002','state','{"id": "000000000002", "state": "cancelling"}',1700000000.0);
INSERT INTO "events" VALUES(4,'000000000003','state','{"id": "000000000003", "state": "cancelled"}',1700000000.0);
INSERT INTO "events" VALUES(5,'000000000004','state','{"id": "000000000004", "state": "failed"}',1700000000.0);
INSERT INTO "events" VALUES(6,'000000000005','state','{"id": "000000000005", "state": "succeeded"}',1700000000.0);
CREATE TABLE heartbeat (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    monotonic REAL NOT NULL,  -- seconds since the machine started
    "full" INTEGER NOT NULL  -- 1: the disk quota is used up
);
INSERT INTO "heartbeat" VALUES(1,1.5,1);
CREATE TABLE idempotency (
    owner TEXT NOT NULL,
    key TEXT NOT NULL,
    digest TEXT NOT NULL,  -- of the request
    job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    PRIMARY KEY (owner, key)
) WITHOUT ROWID;
INSERT INTO "idempotency" VALUES('idempotency owner','idempotency key','idempotency digest','000000000000');
CREATE TABLE job_disk (
    job TEXT PRIMARY KEY REFERENCES jobs (id) ON DELETE CASCADE,
    bytes INTEGER NOT NULL,
    state TEXT NOT NULL,
    attempts INTEGER NOT NULL
);
INSERT INTO "job_disk" VALUES('000000000000',1,'job_disk state',1);
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
, source TEXT, push TEXT, published TEXT, shared INTEGER NOT NULL DEFAULT 0, ran_before REAL NOT NULL DEFAULT 0, state TEXT NOT NULL DEFAULT 'queued' CHECK (state IN (
    'queued', 'running', 'cancelling', 'cancelled', 'failed', 'gate_not_met', 'gate_undecided', 'succeeded'
)), reevaluate INTEGER, run_seconds_left REAL, detail TEXT, made_from TEXT, reads TEXT, work TEXT);
INSERT INTO "jobs" VALUES(1,'000000000000','ann','name ∞ 0','org/model','model: {id: org/model}
calibration: {dataset: org/text}
depth: {remove: 1}
','["depth.remove=2"]','local',0,0,0.1,0,'[]',NULL,NULL,NULL,0.0,NULL,1234.0625,NULL,NULL,NULL,0,1700000000.0,NULL,NULL,NULL,NULL,NULL,0,0.0,'queued',NULL,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(2,'000000000001','bob','name ∞ 1','org/model','model: {id: org/model}
calibration: {dataset: org/text}
depth: {remove: 1}
','["depth.remove=2"]','local',0,-1,0.1,1,'[]',NULL,NULL,NULL,0.0,NULL,1234.0625,NULL,NULL,NULL,0,1700000000.125,1700000060.0,NULL,NULL,NULL,NULL,0,0.0,'running',NULL,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(3,'000000000002','ann','name ∞ 2','org/model','model: {id: org/model}
calibration: {dataset: org/text}
depth: {remove: 1}
','["depth.remove=2"]','local',0,-2,0.1,2,'[]',NULL,NULL,NULL,0.0,NULL,1234.0625,NULL,NULL,NULL,0,1700000000.25,1700000060.0,NULL,NULL,NULL,NULL,0,0.0,'cancelling',NULL,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(4,'000000000003','bob','name ∞ 3','org/model','model: {id: org/model}
calibration: {dataset: org/text}
depth: {remove: 1}
','["depth.remove=2"]','local',0,-3,0.1,3,'[]',NULL,NULL,NULL,0.0,NULL,1234.0625,NULL,NULL,NULL,0,1700000000.375,1700000060.0,1700000090.5,NULL,NULL,NULL,0,0.0,'cancelled',NULL,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(5,'000000000004','ann','name ∞ 4','org/model','model: {id: org/model}
calibration: {dataset: org/text}
depth: {remove: 1}
','["depth.remove=2"]','local',0,-4,0.1,4,'[]',NULL,NULL,NULL,0.0,NULL,1234.0625,1,'it broke',NULL,0,1700000000.5,1700000060.0,1700000090.5,NULL,NULL,NULL,0,0.0,'failed',NULL,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(6,'000000000005','bob','name ∞ 5','org/model','model: {id: org/model}
calibration: {dataset: org/text}
depth: {remove: 1}
','["depth.remove=2"]','local',0,-5,0.1,5,'[]',NULL,NULL,NULL,0.0,NULL,1234.0625,NULL,NULL,'{"parameters": [2, 1], "bytes": [4, 2], "layers": [3, 2], "perplexity": [10.5, 11.5], "retention": 0.9}',0,1700000000.625,1700000060.0,1700000090.5,NULL,NULL,NULL,0,0.0,'succeeded',NULL,NULL,NULL,NULL,NULL,NULL);
CREATE TABLE last_starts (
    owner TEXT PRIMARY KEY,
    number INTEGER NOT NULL  -- among all starts
);
INSERT INTO "last_starts" VALUES('last_starts owner',1);
CREATE TABLE sessions (
    id TEXT PRIMARY KEY,
    digest TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL REFERENCES users (name) ON DELETE CASCADE,
    token TEXT REFERENCES tokens (id) ON DELETE CASCADE,  -- NULL: signed in at the OpenID provider
    browser TEXT NOT NULL DEFAULT '',
    created REAL NOT NULL,
    expires REAL NOT NULL
);
INSERT INTO "sessions" VALUES('sessions dig','sessions digest','tokens name','tokens diges','',-43198.5,1.5);
CREATE TABLE submitted_jobs (
    owner TEXT NOT NULL,
    day INTEGER NOT NULL,  -- days since 1970, UTC
    number INTEGER NOT NULL,
    PRIMARY KEY (owner, day)
);
INSERT INTO "submitted_jobs" VALUES('submitted_jobs owner',1,1);
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
INSERT INTO "tokens" VALUES('tokens diges','tokens name','first','tokens digest','read submit manage approve account admin',1.5,NULL,NULL);
CREATE TABLE user_quotas (
    owner TEXT PRIMARY KEY REFERENCES users (name) ON DELETE CASCADE,
    queued INTEGER,
    running INTEGER,
    gpus INTEGER,
    disk INTEGER,  -- bytes
    per_day INTEGER,
    kept INTEGER
);
INSERT INTO "user_quotas" VALUES('ann',1,1,1,1,1,1);
CREATE TABLE users (
    name TEXT PRIMARY KEY,
    role TEXT NOT NULL CHECK (role IN ('viewer', 'user', 'approver', 'admin')),
    email TEXT,  -- in lower case
    subject TEXT UNIQUE,  -- issuer and subject of the OpenID provider; NULL: has never signed in there
    disabled INTEGER NOT NULL DEFAULT 0,
    created REAL NOT NULL,
    seen REAL  -- the last request, to within minutes
);
INSERT INTO "users" VALUES('tokens name','user',NULL,NULL,0,1.5,NULL);
INSERT INTO "users" VALUES('ann','user',NULL,NULL,0,1700000000.0,NULL);
INSERT INTO "users" VALUES('bob','user',NULL,NULL,0,1700000000.125,NULL);
CREATE INDEX events_by_job ON events (job, id);
CREATE INDEX jobs_by_source ON jobs (source, seq) WHERE source IS NOT NULL;
CREATE INDEX jobs_by_owner_and_arrival ON jobs (owner, seq);
CREATE INDEX shared_jobs_by_arrival ON jobs (seq) WHERE shared = 1;
CREATE INDEX jobs_by_state ON jobs (state, priority DESC, seq);
CREATE INDEX jobs_by_owner ON jobs (owner, state);
CREATE INDEX jobs_by_state_and_arrival ON jobs (state, seq);
CREATE INDEX shared_jobs_by_state ON jobs (state, seq) WHERE shared = 1;
CREATE INDEX shared_jobs_by_state_and_owner ON jobs (state, owner) WHERE shared = 1;
CREATE INDEX idempotency_by_job ON idempotency (job);
CREATE INDEX sessions_by_owner ON sessions (owner, created);
CREATE INDEX jobs_by_made_from ON jobs (made_from, seq) WHERE made_from IS NOT NULL;
CREATE INDEX jobs_by_reads ON jobs (reads, state) WHERE reads IS NOT NULL;
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('jobs',6);
INSERT INTO "sqlite_sequence" VALUES('events',6);
COMMIT;
PRAGMA user_version = 12;
