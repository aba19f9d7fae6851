"""The audit of privacy: tests of what really leaves a client, which rely on no accountant or engine of ours."""
