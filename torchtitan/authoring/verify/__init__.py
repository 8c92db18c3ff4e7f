"""`torchtitan verify`: checks that prove a model right, on a laptop, under every parallelism.

* `check.py`: what a check is, and how to declare one;
* `subject.py`: the model under test;
* `catalog.py`: all checks, from one module for each subject matter (`contract.py`, ...);
* `reference.py`, `observe.py`: a short run of the real trainer, and its recording;
* `compare.py`, `verdict.py`: a layout's run against the run of one process (`layouts.py`);
* `run.py`, `diagnose.py`: run checks on processes, with time limits, and report their outcomes;
* `report.py`, `command.py`: the table, JSON, and the command line.
"""
