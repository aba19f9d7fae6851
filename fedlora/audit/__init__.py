"""The audit of a promise of privacy: tests of what really leaves a client, which trust no accountant and no engine."""
