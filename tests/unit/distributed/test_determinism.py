"""What a deterministic run asks of NVIDIA's libraries, which read it when they begin."""

import os

import pytest
import torch

from torchtitan.distributed.determinism import use_deterministic_kernels

NAMES = ("CUBLAS_WORKSPACE_CONFIG", "NCCL_NVLS_ENABLE")


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch):
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    yield
    torch.use_deterministic_algorithms(False)


def test_sums_of_cublas_and_nccl_have_one_order() -> None:
    use_deterministic_kernels()
    assert [os.environ[name] for name in NAMES] == [":4096:8", "0"]


def test_a_users_own_value_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    use_deterministic_kernels()
    assert os.environ["NCCL_NVLS_ENABLE"] == "1"
