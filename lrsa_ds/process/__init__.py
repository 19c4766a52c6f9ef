"""The processes of a run: launchers, signals, exit codes, and the message at the end."""
