"""What a run says once, on its first rank: the others have the same to say."""

import logging
import os
import warnings
from functools import lru_cache


@lru_cache(maxsize=64)
def say_once(sentence: str) -> None:
    """Warns with a sentence, unless it was said before or this is not the first rank."""
    if os.environ.get("RANK", "0") == "0":
        warnings.warn(sentence, stacklevel=3)


def quiet_bitsandbytes() -> None:
    """Call before an import of bitsandbytes, or of PEFT, which imports it: mutes a line about a kernel of decoding.

    On some CPUs it warns that the package `kernels` is not installed, also where no weight is quantized.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
