"""What a run costs, before it is started: memory, communication, time."""
