"""What a run logs, and the tables and pictures made of it."""
