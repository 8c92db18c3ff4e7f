"""The trainer beside other trainers: same weights, same batches, by turns. See `compare.py`."""
