"""What one rank raises, all raise; also an error that pickle cannot send."""

import threading
import traceback

import pytest
import torch.distributed as dist
from harness import on_ranks

from torchtitan.errors import DataError
from torchtitan.runtime.collective_calls import on_all_ranks, on_rank_zero


class OtherArguments(Exception):
    """As of many packages: its arguments are not what it tells."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{reason} ({code})")


ERRORS = {
    "sent": (DataError("no file"), "DataError: no file"),
    "cannot be pickled": (ValueError("no", threading.Lock()), "ValueError: ('no', "),
    "cannot be unpickled": (OtherArguments(403, "no"), "OtherArguments: no (403)"),
}


def fail(folder, kind: str) -> None:
    def open_data(rank: int = 0, ranks: int = 1) -> None:
        if rank == failing:
            raise ERRORS[kind][0]

    for failing, call in enumerate((on_rank_zero, on_all_ranks)):
        with pytest.raises(Exception) as raised:
            call(open_data, dist.group.WORLD)
        assert ERRORS[kind][1] in f"{type(raised.value).__name__}: {raised.value}"
        if dist.get_rank() == failing:
            frames = traceback.extract_tb(raised.value.__traceback__)
            assert raised.value is ERRORS[kind][0] and frames[-1].name == "open_data"


@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_of_one_rank_is_raised_on_all(kind: str, tmp_path):
    on_ranks(2, fail, tmp_path, kind)
