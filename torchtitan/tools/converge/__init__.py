"""`torchtitan converge`: does a change of layout or technique leave the training as it was?

`runs` says what is compared, `match` that it may be, `launch` starts the jobs, `compare` judges
the curves, `report`, `plots` and `page` show them. See docs/converging.md.
"""
