-- Lists of one state or one owner come from an index in the order of arrival, however many jobs there are.
CREATE INDEX jobs_by_state_and_arrival ON jobs (state, seq);
CREATE INDEX jobs_by_owner_and_arrival ON jobs (owner, seq);
