"""Imported before anything large: no garbage collections until `launch.cli.command` switches them on again.

The imports of a run make hundreds of thousands of objects, which all stay: to look for garbage among them, again and
again, takes a third of their time.
"""

import gc

gc.disable()
