"""Generation with models of other authors, the end of texts, and what it leaves of a model."""

import logging

import pytest
import torch
import torch.nn as nn
from checkpoint_run import world_of_one  # noqa: F401
from tiny_models import tiny_spec
from torch.distributed.fsdp import fully_shard

from torchtitan.errors import DataError
from torchtitan.generation.generator import Generator
from torchtitan.generation.sampling import Sampling
from torchtitan.models.common.attention import CausalMask, ScaledDotProductAttention
from torchtitan.models.common.rope import rope_frequencies, rotation
from torchtitan.protocols import ModelProtocol

GREEDY = Sampling(temperature=0)
DIM, VOCAB, HEADS = 32, 50, 4


class Guide(ModelProtocol):
    """A model by the guide with the common attention, and no code for generation."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCAB, DIM)
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.attend = ScaledDotProductAttention()
        self.mask = CausalMask(window=6)
        self.output = nn.Linear(DIM, VOCAB)

    def embed(self, tokens):
        return self.tok_embeddings(tokens)

    def forward(self, tokens, positions=None, document_ids=None):
        batch, seq = tokens.shape
        if positions is None:
            positions = torch.arange(seq)[None]
        h = self.embed(tokens)
        q, k, v = self.qkv(h).view(batch, seq, 3, HEADS, -1).unbind(2)
        rotate = rotation(positions, rope_frequencies(DIM // HEADS, 100.0))
        mask = self.mask(seq, document_ids, tokens.device)
        q, k, v = (x.transpose(1, 2) for x in (rotate(q), rotate(k), v))
        out = self.attend(q, k, v, mask).transpose(1, 2).flatten(2)
        return self.output(h + out)


class WithConvolution(Guide):
    """Mixes tokens in a way that a cache of keys and values knows nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(DIM, DIM, kernel_size=3)

    def embed(self, tokens):
        h = nn.functional.pad(super().embed(tokens).mT, (2, 0))
        return self.convolution(h).mT


class WithMemory(Guide):
    """Tokens also see the mean of the complete chunks of 16 tokens before theirs."""

    def embed(self, tokens):
        h = super().embed(tokens)
        chunks = h[:, : h.shape[1] // 16 * 16].unflatten(1, (-1, 16)).mean(2).cumsum(1)
        memory = torch.cat([torch.zeros_like(h[:, :1]), chunks], dim=1)
        return h + memory[:, torch.arange(h.shape[1]) // 16]


class WithLearnedPositions(Guide):
    """A table of 32 positions, of which nothing outside tells."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(32, DIM))

    def forward(self, tokens, positions=None, document_ids=None):
        if positions is None:
            positions = torch.arange(tokens.shape[1])[None]
        self.embed = lambda tokens: self.tok_embeddings(tokens) + self.places[positions]
        return super().forward(tokens, positions, document_ids)


class WithLimit(Guide):
    """Refuses more tokens than it is made for."""

    def embed(self, tokens):
        assert tokens.shape[1] <= 40
        return super().embed(tokens)


class NotFiniteAlone(Guide):
    """A single token has no standard deviation."""

    def embed(self, tokens):
        h = super().embed(tokens)
        return h + 0 * h.std(dim=1, keepdim=True)


class WithConvolutionAndKinds(WithConvolution):
    """A small table of something else than positions."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds = nn.Embedding(2, DIM)


class OwnAttention(ModelProtocol):
    """Has an attention of its own, and takes tokens alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.head = nn.Linear(DIM, VOCAB)

    def forward(self, tokens):
        h = self.embed(tokens)
        h = nn.functional.scaled_dot_product_attention(h, h, h, is_causal=True)
        return self.head(h)


def tokens_of(model: nn.Module, prompt: list[int], n: int) -> list[int]:
    """Greedy generation in its plainest form."""
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize(
    ("model_class", "cached"),
    [
        (Guide, True),
        (WithConvolution, False),
        (WithMemory, False),
        (WithLearnedPositions, True),
        (WithLimit, True),
        (WithConvolutionAndKinds, False),
        (OwnAttention, False),
    ],
)
def test_any_model_generates(model_class, cached, caplog):
    torch.manual_seed(0)
    model = model_class()
    with caplog.at_level(logging.WARNING, logger="torchtitan"):
        generator = Generator(model)
    assert generator.uses_cache is cached
    assert not any(module.training for module in model.modules())  # else dropout would act
    assert ("without one" in caplog.text) is (not cached and model_class is not OwnAttention)
    prompts = [[3], [1, 2, 3, 4, 5, 6, 7, 8, 9] * 2, [7, 7]]
    completions = generator.generate(prompts, 10, GREEDY)
    with torch.no_grad():
        assert [c.tokens for c in completions] == [tokens_of(model, p, 10) for p in prompts]


@pytest.mark.filterwarnings("ignore:std")
def test_a_cache_of_numbers_that_are_not_finite_is_not_right():
    torch.manual_seed(0)
    assert not Generator(NotFiniteAlone()).uses_cache


@pytest.mark.usefixtures("world_of_one")
def test_only_models_of_others_are_tried_also_if_sharded():
    spec = tiny_spec("llama3")
    for ours in (True, False):
        model = fully_shard(spec.model_cls(spec.model_args) if ours else Guide())
        passes = []
        model.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        assert Generator(model).uses_cache
        assert bool(passes) is not ours


def test_a_stop_token_ends_a_text():
    torch.manual_seed(0)
    model = Guide()
    tokens = tokens_of(model, [3], 10)
    stop = tokens[4]
    seen = []
    [stopped, other] = Generator(model, [stop]).generate(
        [[3], [5]], 10, GREEDY, on_token=lambda number, token: seen.append((number, token))
    )
    first = tokens.index(stop)
    assert (stopped.tokens, stopped.finish_reason) == (tokens[:first], "stop")
    of_first = [token for number, token in seen if number == 0]
    assert of_first == [*tokens[:first], None]
    assert [token for number, token in seen if number == 1] == [*other.tokens, None]


def test_the_caller_ends_a_text():
    torch.manual_seed(0)
    [completion] = Generator(Guide()).generate([[3]], 10, GREEDY, on_token=lambda *_: True)
    assert (len(completion.tokens), completion.finish_reason) == (1, "stop")


def test_no_tokens_are_asked_for():
    [completion] = Generator(Guide()).generate([[3]], 0, GREEDY)
    assert completion.tokens == []


def test_an_empty_prompt_is_refused():
    with pytest.raises(DataError, match="no tokens"):
        Generator(Guide()).generate([[3], []], 5, GREEDY)


def test_training_code_is_compiled_once_before_and_after_generation():
    """Generation leaves nothing behind that a compiled training graph would see."""
    torch.manual_seed(0)
    model, tokens = Guide(), torch.randint(VOCAB, (2, 16))
    compiled = torch.compile(model, backend="eager")
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled(tokens).sum().backward()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
    assert graphs == 1
    Generator(model).generate([[1, 2, 3]], 4, GREEDY)
    model.train()
    with torch._dynamo.config.patch(error_on_recompile=True):
        # eval mode and back: the graph of training is found again.
        compiled(tokens).sum().backward()
