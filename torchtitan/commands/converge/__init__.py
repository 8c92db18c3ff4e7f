"""`torchtitan converge`: checks that a change of layout or technique does not change training.

`runs` determines what is compared, `match` whether it may be, `launch` starts the jobs, `compare`
judges the curves, `report`, `plots` and `page` show them. See docs/converging.md.
"""
