CREATE TABLE node_losses (
    job TEXT PRIMARY KEY REFERENCES jobs (id) ON DELETE CASCADE,
    in_a_row INTEGER NOT NULL,  -- losses of its node since the job last made progress
    fraction REAL NOT NULL,  -- of the run that was done at the last loss
    ran_before REAL NOT NULL,  -- of the job at the last loss: a retry begins a new row of losses
    machines TEXT NOT NULL  -- JSON list of the lost nodes' addresses
);
-- Deleted jobs whose objects may still be in the artefact store.
CREATE TABLE artifact_removals (
    job TEXT PRIMARY KEY
);
-- GPUs of the largest node of each cluster, as its launcher last saw it.
CREATE TABLE clusters (
    launcher TEXT PRIMARY KEY,
    node_gpus INTEGER NOT NULL
);
