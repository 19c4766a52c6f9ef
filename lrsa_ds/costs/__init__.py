"""What a step costs: FLOPs, memory, bytes and time, from integers; and what GPUs can do."""
