BEGIN TRANSACTION;
CREATE TABLE artifact_removals (
    job TEXT PRIMARY KEY
);
INSERT INTO "artifact_removals" VALUES('artifact_removals job');
CREATE TABLE clusters (
    launcher TEXT PRIMARY KEY,
    node_gpus INTEGER NOT NULL
);
INSERT INTO "clusters" VALUES('clusters launcher',1);
CREATE TABLE deleted_users (
    name TEXT PRIMARY KEY,
    subject TEXT,  -- SHA-256 of issuer and subject; NULL: never signed in at the provider
    deleted REAL NOT NULL
);
INSERT INTO "deleted_users" VALUES('deleted_users name','deleted_users subject',1.5);
CREATE TABLE drafts (
    owner TEXT PRIMARY KEY,
    recipe TEXT NOT NULL,
    settings TEXT NOT NULL,  -- JSON: the other fields of the page
    saved REAL NOT NULL
);
INSERT INTO "drafts" VALUES('drafts owner','drafts recipe','drafts settings',1.5);
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
)), reevaluate INTEGER, run_seconds_left REAL, detail TEXT, made_from TEXT, work TEXT, uploaded INTEGER NOT NULL DEFAULT 0);
INSERT INTO "jobs" VALUES(1,'000000000000','ann','name ∞ 0','org/model','model: {id: org/model}
calibration: {dataset: org/text}
depth: {remove: 1}
','["depth.remove=2"]','local',0,0,0.1,0,'[]',NULL,NULL,NULL,0.0,NULL,1234.0625,NULL,NULL,NULL,0,1700000000.0,NULL,NULL,NULL,NULL,NULL,0,0.0,'queued',NULL,NULL,NULL,'000000000005','{"kind":"size","keep":0.5}',0);
INSERT INTO "jobs" VALUES(2,'000000000001','bob','name ∞ 1','org/model','model: {id: org/model}
calibration: {dataset: org/text}
depth: {remove: 1}
','["depth.remove=2"]','local',0,-1,0.1,1,'[]',NULL,NULL,NULL,0.0,NULL,1234.0625,NULL,NULL,NULL,0,1700000000.125,1700000060.0,NULL,NULL,NULL,NULL,0,0.0,'running',NULL,NULL,NULL,NULL,NULL,0);
INSERT INTO "jobs" VALUES(3,'000000000002','ann','name ∞ 2','org/model','model: {id: org/model}
calibration: {dataset: org/text}
depth: {remove: 1}
','["depth.remove=2"]','local',0,-2,0.1,2,'[]',NULL,NULL,NULL,0.0,NULL,1234.0625,NULL,NULL,NULL,0,1700000000.25,1700000060.0,NULL,NULL,NULL,NULL,0,0.0,'cancelling',NULL,NULL,NULL,NULL,NULL,0);
INSERT INTO "jobs" VALUES(4,'000000000003','bob','name ∞ 3','org/model','model: {id: org/model}
calibration: {dataset: org/text}
depth: {remove: 1}
','["depth.remove=2"]','local',0,-3,0.1,3,'[]',NULL,NULL,NULL,0.0,NULL,1234.0625,NULL,NULL,NULL,0,1700000000.375,1700000060.0,1700000090.5,'000000000005','{"repo_id": "org/name"}',NULL,0,0.0,'cancelled',NULL,NULL,NULL,NULL,NULL,0);
INSERT INTO "jobs" VALUES(5,'000000000004','ann','name ∞ 4','org/model','model: {id: org/model}
calibration: {dataset: org/text}
depth: {remove: 1}
','["depth.remove=2"]','local',0,-4,0.1,4,'[]',NULL,NULL,NULL,0.0,NULL,1234.0625,1,'it broke',NULL,0,1700000000.5,1700000060.0,1700000090.5,NULL,NULL,NULL,0,0.0,'failed',NULL,NULL,NULL,NULL,NULL,0);
INSERT INTO "jobs" VALUES(6,'000000000005','bob','name ∞ 5','org/model','model: {id: org/model}
calibration: {dataset: org/text}
depth: {remove: 1}
','["depth.remove=2"]','local',0,-5,0.1,5,'[]',NULL,NULL,NULL,0.0,NULL,1234.0625,NULL,NULL,'{"parameters": [2, 1], "bytes": [4, 2], "layers": [3, 2], "perplexity": [10.5, 11.5], "retention": 0.9}',0,1700000000.625,1700000060.0,1700000090.5,NULL,NULL,NULL,0,0.0,'succeeded',NULL,NULL,NULL,NULL,NULL,0);
CREATE TABLE last_starts (
    owner TEXT PRIMARY KEY,
    number INTEGER NOT NULL  -- among all starts
);
INSERT INTO "last_starts" VALUES('last_starts owner',1);
CREATE TABLE lent_artifacts (
    job TEXT PRIMARY KEY REFERENCES jobs (id) ON DELETE CASCADE
);
INSERT INTO "lent_artifacts" VALUES('000000000000');
CREATE TABLE model_tags (
    tag TEXT NOT NULL,
    job TEXT NOT NULL REFERENCES models (job) ON DELETE CASCADE,
    PRIMARY KEY (tag, job)
);
INSERT INTO "model_tags" VALUES('model_tags tag','000000000000');
CREATE TABLE models (
    job TEXT PRIMARY KEY REFERENCES jobs (id) ON DELETE CASCADE,
    seq BIGINT NOT NULL,  -- of the job
    owner TEXT NOT NULL,
    shared INTEGER NOT NULL,
    name TEXT NOT NULL,  -- lower case
    base TEXT NOT NULL,  -- the model that was pruned
    parameters BIGINT NOT NULL,
    bytes BIGINT NOT NULL,
    size REAL NOT NULL,  -- share of the dense model's bytes
    retention REAL NOT NULL,
    speed REAL NOT NULL,  -- tokens per second, pruned / dense
    finished REAL NOT NULL,
    stage TEXT NOT NULL DEFAULT 'candidate' CHECK (stage IN ('candidate', 'approved', 'retired')),
    tags TEXT NOT NULL DEFAULT '',  -- sorted, separated by spaces; model_tags has them one by one
    words TEXT NOT NULL,  -- name, base and id in lower case, for the search
    label_words TEXT NOT NULL DEFAULT '',  -- tags and notes in lower case, for the search
    notes TEXT NOT NULL DEFAULT ''
);
INSERT INTO "models" VALUES('000000000000',1,'models owner',1,'models name','models base',1,1,1.5,1.5,1.5,1.5,'candidate','models tags','models words','models label_words','models notes');
CREATE TABLE node_losses (
    job TEXT PRIMARY KEY REFERENCES jobs (id) ON DELETE CASCADE,
    in_a_row INTEGER NOT NULL,  -- losses of its node since the job last made progress
    fraction REAL NOT NULL,  -- of the run that was done at the last loss
    ran_before REAL NOT NULL,  -- of the job at the last loss: a retry begins a new row of losses
    machines TEXT NOT NULL  -- JSON list of the lost nodes' addresses
);
INSERT INTO "node_losses" VALUES('000000000000',1,1.5,1.5,'node_losses machines');
CREATE TABLE notify_defaults (  -- for new jobs that name no targets
    owner TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('webhook', 'email')),
    target TEXT NOT NULL,
    PRIMARY KEY (owner, kind, target)
);
INSERT INTO "notify_defaults" VALUES('ann','webhook','https://hooks.example.org/secret-of-a-hook');
CREATE TABLE notify_targets (
    job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    kind TEXT NOT NULL CHECK (kind IN ('webhook', 'email')),
    target TEXT NOT NULL,
    PRIMARY KEY (job, kind, target)
);
INSERT INTO "notify_targets" VALUES('000000000000','webhook','https://hooks.example.org/secret-of-a-hook');
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
INSERT INTO "outbox" VALUES('outbox id','outbox job','ann','webhook','https://hooks.example.org/secret-of-a-hook','outbox body','pending',1,'outbox error',1.5,1.5,1.5);
CREATE TABLE run_times (
    kind TEXT PRIMARY KEY,
    runs INTEGER NOT NULL,
    last REAL NOT NULL,  -- seconds, as are shortest and longest
    shortest REAL NOT NULL,
    longest REAL NOT NULL
);
INSERT INTO "run_times" VALUES('run_times kind',1,1.5,1.5,1.5);
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
CREATE TABLE shared_scores (  -- jobs of a sweep that need the same scores
    job TEXT PRIMARY KEY REFERENCES jobs (id) ON DELETE CASCADE,
    score_group TEXT NOT NULL
);
INSERT INTO "shared_scores" VALUES('000000000000','shared_scores score_group');
CREATE TABLE submitted_jobs (
    owner TEXT NOT NULL,
    day INTEGER NOT NULL,  -- days since 1970, UTC
    number INTEGER NOT NULL,
    PRIMARY KEY (owner, day)
);
INSERT INTO "submitted_jobs" VALUES('submitted_jobs owner',1,1);
CREATE TABLE sweep_jobs (
    job TEXT PRIMARY KEY REFERENCES jobs (id) ON DELETE CASCADE,
    sweep TEXT NOT NULL REFERENCES sweeps (id) ON DELETE CASCADE,
    place INTEGER NOT NULL,  -- in the order of the values
    point TEXT NOT NULL  -- JSON: list of the value of each key
);
INSERT INTO "sweep_jobs" VALUES('000000000000','sweeps id',1,'sweep_jobs point');
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
INSERT INTO "sweeps" VALUES('sweeps id','sweeps owner',1,'sweeps name','sweeps axes',1.5,'sweeps idempotency_key','sweeps digest');
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
CREATE TABLE uploads (
    id TEXT PRIMARY KEY,  -- that of the job which it becomes; its files are in that job's folder
    owner TEXT NOT NULL,
    digest TEXT NOT NULL,  -- of the request
    request TEXT NOT NULL,  -- JSON: files, name and labels
    changed REAL NOT NULL,  -- when bytes last arrived
    UNIQUE (owner, digest)
);
INSERT INTO "uploads" VALUES('uploads id','uploads owner','uploads digest','uploads request',1.5);
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
CREATE TABLE uses (
    job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    used TEXT NOT NULL,
    part TEXT NOT NULL CHECK (part IN ('model', 'scores', 'run')),
    PRIMARY KEY (job, used)
) WITHOUT ROWID;
INSERT INTO "uses" VALUES('000000000000','000000000005','scores');
INSERT INTO "uses" VALUES('000000000001','000000000005','model');
INSERT INTO "uses" VALUES('000000000003','000000000005','run');
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
CREATE INDEX models_by_name ON models (name, seq, owner, shared);
CREATE INDEX models_by_base ON models (base, seq, owner, shared);
CREATE INDEX models_by_parameters ON models (parameters, seq, owner, shared);
CREATE INDEX models_by_bytes ON models (bytes, seq, owner, shared);
CREATE INDEX models_by_size ON models (size, seq, owner, shared);
CREATE INDEX models_by_retention ON models (retention, seq, owner, shared);
CREATE INDEX models_by_speed ON models (speed, seq, owner, shared);
CREATE INDEX models_by_finished ON models (finished, seq, owner, shared);
CREATE INDEX models_by_stage ON models (stage, seq, owner, shared);
CREATE INDEX models_by_owner ON models (owner, seq, shared);
CREATE INDEX model_tags_by_job ON model_tags (job);
CREATE INDEX jobs_with_figures ON jobs (seq) WHERE figures IS NOT NULL AND source IS NULL;
CREATE INDEX jobs_by_model ON jobs (model, seq);
CREATE INDEX uploaded_jobs ON jobs (id) WHERE uploaded = 1;
CREATE INDEX sweeps_by_arrival ON sweeps (created, id);
CREATE INDEX sweep_jobs_by_sweep ON sweep_jobs (sweep, place);
CREATE INDEX drafts_by_time ON drafts (saved);
CREATE INDEX outbox_by_state ON outbox (state, due);
CREATE INDEX outbox_by_job ON outbox (job, created);
CREATE INDEX outbox_by_owner ON outbox (owner, state, ended);
CREATE INDEX deleted_users_by_subject ON deleted_users (subject);
CREATE INDEX shared_scores_by_group ON shared_scores (score_group);
CREATE INDEX uses_by_used ON uses (used);
CREATE INDEX jobs_to_clean ON jobs (finished) WHERE cleaned = 0 AND source IS NULL AND finished IS NOT NULL;
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('jobs',6);
INSERT INTO "sqlite_sequence" VALUES('events',6);
COMMIT;
PRAGMA user_version = 23;
