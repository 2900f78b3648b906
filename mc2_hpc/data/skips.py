"""The error of a shard that is skipped. Bad samples are skipped and counted by the reasons of :mod:`mc2_hpc.drops`."""


class ShardError(Exception):
    """A shard cannot be used; the message says why."""
