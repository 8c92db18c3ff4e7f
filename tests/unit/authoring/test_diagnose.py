"""Of a traceback, the line of the model's author is shown."""

import sysconfig
from pathlib import Path

import pytest

import torchtitan
from torchtitan.authoring.verify.diagnose import explain
from torchtitan.errors import ConfigError
from torchtitan.runtime.ranks import RankFailure

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
        (
            [f"{OURS}/train.py", "/home/me/torch/model.py", f"{SITE}/torch/x.py"],
            "/home/me/torch/model.py",
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


def test_a_mixture_of_plain_and_distributed_tensors_is_a_style_that_is_missing():
    reason = "RuntimeError: aten.add.Tensor got mixed torch.Tensor and DTensor, need to convert all"
    trace = '  File "/home/me/model.py", line 7, in forward\n    x + self.norm(x)\n'
    _, place = explain([RankFailure(0, reason, trace, exit_code=1)])
    assert place.startswith("/home/me/model.py:7 in forward. ")
    assert "SequenceParallel(use_local_output=True)" in place


def test_an_index_out_of_range_may_be_a_table_of_positions():
    trace = '  File "/home/me/model.py", line 7, in forward\n    self.places(positions)\n'
    failure = RankFailure(0, "IndexError: index out of range in self", trace, exit_code=1)
    assert "max_seq_len" in explain([failure])[1]
    failure.reason = "IndexError: Target 264 is out of bounds."
    assert "max_seq_len" not in explain([failure])[1]


def test_a_message_to_the_user_is_told_as_it_is():
    trace = f'  File "{OURS}/protocols/train_spec.py", line 7, in updated_args\n    raise\n'
    error = ConfigError("update_from_config returns None")
    failure = RankFailure(0, f"ConfigError: {error}", trace, exit_code=1, exception=error)
    assert explain([failure]) == ("update_from_config returns None", "")


def test_a_crash_of_a_layout_has_the_usual_mistakes_as_a_note():
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    error.add_note("the tensor-parallel plan")
    trace = '  File "/home/me/model.py", line 7, in forward\n    self.wo(x)\n'
    failure = RankFailure(0, f"RuntimeError: {error}", trace, exit_code=1, exception=error)
    expected = "/home/me/model.py:7 in forward. Then the tensor-parallel plan"
    assert explain([failure])[1] == expected


@pytest.mark.parametrize(
    ("file", "advice"),
    [(f"{STDLIB}/threading.py", "may be slow or busy"), ("distributed_c10d.py", "same order")],
)
def test_ranks_that_are_not_done_wait_for_others_or_are_slow(file, advice):
    stacks = f'Current thread 0x1 (most recent call first):\n  File "{file}", line 7 in wait\n'
    assert advice in explain([RankFailure(0, "not done after 240 s", stacks)])[1]


def test_a_rank_that_computes_lets_the_others_wait():
    """Whether it is on a busy machine, or never ends: it misses no collective."""
    stacks = 'Current thread 0x1 (most recent call first):\n  File "{}", line 7 in wait\n'
    failures = [
        RankFailure(0, "not done after 240 s", stacks.format("distributed_c10d.py")),
        RankFailure(1, "not done after 240 s", stacks.format("model.py"), computed=True),
    ]
    assert explain(failures)[1].startswith("rank 1 still computed. The machine may be slow or busy")
