"""Takes the lock of a directory as its input says, "take MOMENT DIRECTORY" on the monotonic clock, or gives it back."""

import sys
import time
from pathlib import Path

from lrsa_ds.directories.lock import RunLock, this_process
from lrsa_ds.errors import LRSAError

lock = None
print("ready", flush=True)
for line in sys.stdin:
    if line.startswith("give"):
        lock.release()
        print("given", flush=True)
        continue
    _, moment, directory = line.split(maxsplit=2)
    lock = RunLock(Path(directory.strip()), beat=0.1, patience=5.0)
    while time.monotonic() < float(moment):
        pass
    try:
        lock.acquire([this_process()])
        print("held", flush=True)
    except LRSAError as error:
        print(f"refused: {error}", flush=True)
