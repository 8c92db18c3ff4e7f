"""Tokens are drawn from the distribution that temperature, top-k and top-p describe."""

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from torchtitan.errors import CheckpointError, ConfigError
from torchtitan.generation.sampling import Sampler, Sampling
from torchtitan.generation.scoring import score

CASES = [
    Sampling(),
    Sampling(temperature=0.5),
    Sampling(temperature=2.0, top_k=5),
    Sampling(top_p=0.7),
    Sampling(top_p=1.0),
    Sampling(temperature=1.5, top_k=12, top_p=0.9),
    Sampling(top_k=1000),
]


def random_logits(rows: int) -> torch.Tensor:
    return 2 * torch.randn(rows, 20, generator=torch.Generator().manual_seed(0))


def by_transformers(sampling: Sampling, logits: torch.Tensor) -> torch.Tensor:
    logits = TemperatureLogitsWarper(float(sampling.temperature))(None, logits)
    if sampling.top_k is not None:
        logits = TopKLogitsWarper(sampling.top_k)(None, logits)
    if sampling.top_p is not None:
        logits = TopPLogitsWarper(sampling.top_p)(None, logits)
    return logits.softmax(-1)


@pytest.mark.parametrize("sampling", CASES, ids=str)
def test_probabilities_are_those_of_transformers(sampling):
    logits = random_logits(50)
    expected = by_transformers(sampling, logits)
    torch.testing.assert_close(sampling.probabilities(logits), expected, atol=1e-6, rtol=1e-5)


def test_top_p_needs_no_token_beyond_its_probability():
    sampling, logits = Sampling(top_p=0.5), torch.zeros(1, 2)
    assert by_transformers(sampling, logits).amax() == 1
    assert sampling.probabilities(logits).tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("sampling", CASES, ids=str)
def test_draws_follow_the_probabilities(sampling):
    """Pearson's chi-squared test, with fixed seeds."""
    n = 20_000
    logits = random_logits(1)
    sampler = Sampler(sampling, range(100))
    draws = torch.cat([sampler.next_tokens(logits.expand(100, -1)) for _ in range(n // 100)])
    counts = draws.bincount(minlength=20).double()
    expected = by_transformers(sampling, logits)[0].double() * n
    possible = expected > 0
    assert counts[~possible].sum() == 0
    if possible.sum() > 1:
        expected = expected[possible] * (n / expected[possible].sum())
        statistic = ((counts[possible] - expected).square() / expected).sum()
        degrees = torch.tensor(len(expected) - 1.0, dtype=torch.float64)
        assert torch.special.gammaincc(degrees / 2, statistic / 2) > 0.001  # the p-value


def test_greedy_takes_the_most_likely_token():
    logits = random_logits(50)
    tokens = Sampler(Sampling(temperature=0), range(50)).next_tokens(logits)
    assert torch.equal(tokens, logits.argmax(-1))


def test_a_stream_of_random_numbers_belongs_to_its_seed_and_number():
    logits = random_logits(1).expand(64, -1)

    def draw(seed: int, streams: list[int]) -> list[list[int]]:
        sampler = Sampler(Sampling(seed=seed), streams)
        rows = logits[: len(streams)]
        return torch.stack([sampler.next_tokens(rows) for _ in range(30)], dim=1).tolist()

    together = draw(0, [0, 1, 2])
    assert draw(0, [2, 0]) == [together[2], together[0]]
    assert together[0] != together[1]
    assert draw(1, [0]) != draw(0, [0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": float("inf")}, "temperature = inf"),
        ({"top_k": 0}, "top_k = 0"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_p": 1.5}, "top_p = 1.5"),
        ({"top_p": float("nan")}, "top_p = nan"),
        ({"temperature": 0, "top_p": 0.9}, "top_p has no effect"),
    ],
)
def test_nonsense_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**fields)


def test_probabilities_whose_sum_is_rounded_down_give_a_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rounded = torch.tensor([[0.5, 0.25]]).expand(64, 2)
    monkeypatch.setattr(Sampling, "probabilities", lambda *_: rounded)
    assert set(Sampler(Sampling(), range(64)).next_tokens(torch.zeros(64, 2)).tolist()) == {0, 1}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_told(temperature, number):
    logits = random_logits(2)
    sampler = Sampler(Sampling(temperature=temperature), [0, 1])
    logits[0, 3] = float("-inf")  # a token that cannot come
    sampler.next_tokens(logits)
    logits[1, 5] = number
    with pytest.raises(CheckpointError, match=r"logits are NaN or infinite.*--dtype float16"):
        sampler.next_tokens(logits)


def test_scores_that_are_no_numbers_are_told():
    model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8))
    score(model, [([1], [2])], 1)
    torch.nn.init.constant_(model[1].bias, float("nan"))
    with pytest.raises(CheckpointError, match="logits are NaN"):
        score(model, [([1], [2])], 1)
