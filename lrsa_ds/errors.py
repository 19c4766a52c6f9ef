"""What ends a run with a single sentence instead of a traceback."""


class LRSAError(ValueError):
    """Something the user can mend: the message is one sentence that names the key and the valid values."""


class Stopped(Exception):
    """A signal has asked the run to stop; it left a checkpoint, and the same command goes on from there."""
