-- The job whose finished model another job prunes.
CREATE TABLE bases (
    job TEXT PRIMARY KEY REFERENCES jobs (id) ON DELETE CASCADE,
    base TEXT NOT NULL
);
CREATE INDEX bases_by_base ON bases (base);
