-- Quotas of one user in place of the service's, one a row. A quota without a row is the service's; NULL is no limit.
CREATE TABLE own_quotas (
    owner TEXT NOT NULL REFERENCES users (name) ON DELETE CASCADE,
    quota TEXT NOT NULL,
    value INTEGER,  -- of disk: bytes
    PRIMARY KEY (owner, quota)
);
INSERT INTO own_quotas (owner, quota, value)
SELECT owner, 'queued', CASE WHEN queued >= 0 THEN queued END FROM user_quotas WHERE queued IS NOT NULL
UNION ALL
SELECT owner, 'running', CASE WHEN running >= 0 THEN running END FROM user_quotas WHERE running IS NOT NULL
UNION ALL
SELECT owner, 'gpus', CASE WHEN gpus >= 0 THEN gpus END FROM user_quotas WHERE gpus IS NOT NULL
UNION ALL
SELECT owner, 'disk', CASE WHEN disk >= 0 THEN disk END FROM user_quotas WHERE disk IS NOT NULL
UNION ALL
SELECT owner, 'per_day', CASE WHEN per_day >= 0 THEN per_day END FROM user_quotas WHERE per_day IS NOT NULL
UNION ALL
SELECT owner, 'kept', CASE WHEN kept >= 0 THEN kept END FROM user_quotas WHERE kept IS NOT NULL;
DROP TABLE user_quotas;
