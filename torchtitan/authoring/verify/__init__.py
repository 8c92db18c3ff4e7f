"""`torchtitan verify`: checks that prove a model right, on a laptop, under every parallelism.

* `check.py`: what a check is, and how one is declared;
* `subject.py`: the model under test;
* `catalog.py`: all checks, from one module for each subject matter (`contract.py`, ...);
* `reference.py`, `observe.py`: a short run of the real trainer, and what it records;
* `compare.py`, `verdict.py`: a layout's run against that of one process (`layouts.py`);
* `run.py`, `diagnose.py`: runs them on processes, with time limits, and says what became of them;
* `report.py`, `command.py`: the table, JSON, and the command line.
"""
