"""The one kind of error that is shown to a user as a single sentence, without a traceback."""


class LRSAError(ValueError):
    """Something the user can mend: the message is one sentence that names the key and the valid values."""
