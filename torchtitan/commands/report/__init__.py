"""`torchtitan report`: shows the logs of runs as a self-contained page."""
