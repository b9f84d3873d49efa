"""Launchers: the shards of a job, here or elsewhere."""
