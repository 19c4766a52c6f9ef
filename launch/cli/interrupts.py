"""Imported before anything large: Ctrl-C during the imports ends the process without a traceback."""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)
