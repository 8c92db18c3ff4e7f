"""`torchtitan checkpoint`: a look at the checkpoints of a run."""
