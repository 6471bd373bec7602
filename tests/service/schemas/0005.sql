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
, source TEXT, push TEXT, published TEXT, shared INTEGER NOT NULL DEFAULT 0);
INSERT INTO "jobs" VALUES(1,'000000000000','ann','name ∞ 0','org/model','model: {id: org/model}
calibration: {dataset: org/text}
depth: {remove: 1}
','["depth.remove=2"]','local',0,0,0.1,'queued',0,'[]',NULL,NULL,NULL,0.0,NULL,1234.0625,NULL,NULL,NULL,0,1700000000.0,NULL,NULL,NULL,NULL,NULL,0);
INSERT INTO "jobs" VALUES(2,'000000000001','bob','name ∞ 1','org/model','model: {id: org/model}
calibration: {dataset: org/text}
depth: {remove: 1}
','["depth.remove=2"]','local',0,-1,0.1,'running',1,'[]',NULL,NULL,NULL,0.0,NULL,1234.0625,NULL,NULL,NULL,0,1700000000.125,1700000060.0,NULL,NULL,NULL,NULL,0);
INSERT INTO "jobs" VALUES(3,'000000000002','ann','name ∞ 2','org/model','model: {id: org/model}
calibration: {dataset: org/text}
depth: {remove: 1}
','["depth.remove=2"]','local',0,-2,0.1,'cancelling',2,'[]',NULL,NULL,NULL,0.0,NULL,1234.0625,NULL,NULL,NULL,0,1700000000.25,1700000060.0,NULL,NULL,NULL,NULL,0);
INSERT INTO "jobs" VALUES(4,'000000000003','bob','name ∞ 3','org/model','model: {id: org/model}
calibration: {dataset: org/text}
depth: {remove: 1}
','["depth.remove=2"]','local',0,-3,0.1,'cancelled',3,'[]',NULL,NULL,NULL,0.0,NULL,1234.0625,NULL,NULL,NULL,0,1700000000.375,1700000060.0,1700000090.5,NULL,NULL,NULL,0);
INSERT INTO "jobs" VALUES(5,'000000000004','ann','name ∞ 4','org/model','model: {id: org/model}
calibration: {dataset: org/text}
depth: {remove: 1}
','["depth.remove=2"]','local',0,-4,0.1,'failed',4,'[]',NULL,NULL,NULL,0.0,NULL,1234.0625,1,'it broke',NULL,0,1700000000.5,1700000060.0,1700000090.5,NULL,NULL,NULL,0);
INSERT INTO "jobs" VALUES(6,'000000000005','bob','name ∞ 5','org/model','model: {id: org/model}
calibration: {dataset: org/text}
depth: {remove: 1}
','["depth.remove=2"]','local',0,-5,0.1,'succeeded',5,'[]',NULL,NULL,NULL,0.0,NULL,1234.0625,NULL,NULL,'{"parameters": [2, 1], "bytes": [4, 2], "layers": [3, 2], "perplexity": [10.5, 11.5], "retention": 0.9}',0,1700000000.625,1700000060.0,1700000090.5,NULL,NULL,NULL,0);
CREATE TABLE sessions (
    digest TEXT PRIMARY KEY,
    token TEXT NOT NULL REFERENCES tokens (name) ON DELETE CASCADE,
    expires REAL NOT NULL
) WITHOUT ROWID;
INSERT INTO "sessions" VALUES('sessions digest','tokens name',1.5);
CREATE TABLE tokens (
    name TEXT PRIMARY KEY,
    role TEXT NOT NULL CHECK (role IN ('user', 'admin')),
    digest TEXT NOT NULL UNIQUE,  -- SHA-256 of the token, which itself is kept nowhere
    created REAL NOT NULL
) WITHOUT ROWID;
INSERT INTO "tokens" VALUES('tokens name','user','tokens digest',1.5);
CREATE INDEX jobs_by_state ON jobs (state, priority DESC, seq);
CREATE INDEX jobs_by_owner ON jobs (owner, state);
CREATE INDEX events_by_job ON events (job, id);
CREATE INDEX jobs_by_source ON jobs (source, seq) WHERE source IS NOT NULL;
CREATE INDEX jobs_by_state_and_arrival ON jobs (state, seq);
CREATE INDEX jobs_by_owner_and_arrival ON jobs (owner, seq);
CREATE INDEX shared_jobs_by_arrival ON jobs (seq) WHERE shared = 1;
CREATE INDEX shared_jobs_by_state ON jobs (state, seq) WHERE shared = 1;
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('jobs',6);
INSERT INTO "sqlite_sequence" VALUES('events',6);
COMMIT;
PRAGMA user_version = 5;
