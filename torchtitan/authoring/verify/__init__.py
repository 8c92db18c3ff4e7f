"""`torchtitan verify`: checks that prove a model right, on a laptop, under every parallelism.

* `check.py`: what a check is;
* `subject.py`: the model under test;
* `catalog.py`: all checks, from one module for each subject matter (`contract.py`, ...);
* `run.py`: runs them on processes, with time limits;
* `report.py`, `command.py`: the table, JSON, and the command line.
"""
