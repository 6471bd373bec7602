-- How long finished jobs ran, for the estimates of the jobs that wait. A kind is a digest of owner, recipe and devices.
CREATE TABLE run_times (
    kind TEXT PRIMARY KEY,
    runs INTEGER NOT NULL,
    last REAL NOT NULL,  -- seconds, as are shortest and longest
    shortest REAL NOT NULL,
    longest REAL NOT NULL
);
