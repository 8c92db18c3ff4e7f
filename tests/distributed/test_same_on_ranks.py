"""Ranks that were started with other options, or with another copy of the data, do not train."""

import torch.distributed as dist
from harness import on_ranks

from torchtitan.components.tokenizer import BytesTokenizer
from torchtitan.config import JobConfig
from torchtitan.data import DataLoader
from torchtitan.data.encode import Encoder
from torchtitan.errors import ConfigError
from torchtitan.preflight.same_on_ranks import refuse_other_data, refuse_other_options


def start_with_other_options(folder) -> None:
    config = JobConfig()
    config.job.dump_folder = f"/scratch/{dist.get_rank()}"  # of rank 0 alone
    refuse_other_options(config)
    config.optimizer.lr = 0.1 * (1 + dist.get_rank())
    try:
        refuse_other_options(config)
    except ConfigError as error:
        message = str(error)
    assert message.startswith("rank 1 (host ") and "differs from rank 0 (host " in message
    assert "\n  optimizer.lr = 0.2 (on rank 0: 0.1)\nStart all ranks with the same" in message
    assert message.count("\n") == 2


def test_other_options_of_a_rank_are_refused(tmp_path):
    on_ranks(2, start_with_other_options, tmp_path)


def read_other_copies(folder) -> None:
    texts = [f"text {number}" for number in range(20)]
    for copy, said in ((texts[::-1], "sample = "), (texts[:-1], "documents = 19 (on rank 0: 20)")):
        source = copy if dist.get_rank() else texts
        with_loader(texts)
        try:
            with_loader(source)
        except ConfigError as error:
            message = str(error)
        assert f"training.dataset: {said}" in message and "the same files" in message


def with_loader(texts: list[str]) -> None:
    loader = DataLoader(texts, Encoder(BytesTokenizer()), 8, 1, 2, dist.get_rank(), 2)
    refuse_other_data(loader)


def test_other_copies_of_the_data_are_refused(tmp_path):
    on_ranks(2, read_other_copies, tmp_path)
