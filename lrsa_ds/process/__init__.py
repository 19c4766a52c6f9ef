"""The processes of a run: launchers, signals, exit codes, and which rank speaks."""
