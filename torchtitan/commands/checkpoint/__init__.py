"""`torchtitan checkpoint`: inspects the checkpoints of a run."""
