CREATE TABLE tokens (
    name TEXT PRIMARY KEY,
    role TEXT NOT NULL CHECK (role IN ('user', 'admin')),
    digest TEXT NOT NULL UNIQUE,  -- SHA-256 of the token, which itself is kept nowhere
    created REAL NOT NULL
) WITHOUT ROWID;

CREATE TABLE sessions (
    digest TEXT PRIMARY KEY,
    token TEXT NOT NULL REFERENCES tokens (name) ON DELETE CASCADE,
    expires REAL NOT NULL
) WITHOUT ROWID;
