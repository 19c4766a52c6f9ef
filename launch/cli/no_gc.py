"""Imported before anything large: disables garbage collection until `launch.cli.command` enables it again.

The imports of a run create hundreds of thousands of objects that are never freed; collections that examine them
repeatedly take a third of the import time.
"""

import gc

gc.disable()
