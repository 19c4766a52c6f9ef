"""Imported before anything large: Ctrl-C ends a process that has not begun, without a traceback."""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)
