"""A disk without space, for tests of what is written."""

import resource
from contextlib import contextmanager


@contextmanager
def full_disk(room=20_000):
    """No file can grow beyond so many bytes; the error says so in words of its own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
