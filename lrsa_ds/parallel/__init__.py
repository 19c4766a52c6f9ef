"""Ranks: how they meet, share sequences, optimizer states and losses, and notice that one of them hangs."""
