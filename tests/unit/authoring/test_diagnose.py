"""Of a traceback, the line of the model's author is shown."""

import sysconfig
from pathlib import Path

import pytest

import torchtitan
from torchtitan.authoring.verify.diagnose import explain
from torchtitan.distributed.ranks import RankFailure

OURS = Path(torchtitan.__file__).parent
STDLIB = sysconfig.get_path("stdlib")
SITE = sysconfig.get_path("purelib")


@pytest.mark.parametrize(
    ("files", "shown"),
    [
        (
            [f"{OURS}/train.py", "/home/me/model.py", f"{OURS}/distributed/init.py"],
            "/home/me/model.py",
        ),
        ([f"{OURS}/train.py", f"{OURS}/models/llama3/a.py", f"{SITE}/torch/x.py"], "llama3/a.py"),
        ([f"{OURS}/train.py", f"{SITE}/mine/model.py", f"{STDLIB}/json/a.py"], "mine/model.py"),
        ([f"{OURS}/train.py", f"{OURS}/distributed/fsdp.py"], "distributed/fsdp.py"),
    ],
)
def test_the_innermost_line_of_the_author(files, shown):
    trace = "".join(f'  File "{file}", line 7, in f\n    f()\n' for file in files)
    _, place = explain([RankFailure(0, "RuntimeError: bad", trace, exit_code=1)])
    assert shown in place and place.endswith(":7 in f")
