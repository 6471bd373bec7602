-- Names and OpenID sign-ins of deleted users: a sign-in at the provider makes none of them again.
CREATE TABLE deleted_users (
    name TEXT PRIMARY KEY,
    subject TEXT,  -- SHA-256 of issuer and subject; NULL: never signed in at the provider
    deleted REAL NOT NULL
);
CREATE INDEX deleted_users_by_subject ON deleted_users (subject);
