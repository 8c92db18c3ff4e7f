"""What is generated is what `transformers` generates, with and without a cache, in any batch."""

import pytest
import tiny_hf
import torch

from torchtitan.generation.cache import KVCache
from torchtitan.generation.generator import Generator
from torchtitan.generation.sampling import Sampling

NEW_TOKENS = 24
GREEDY = Sampling(temperature=0)
LENGTHS = (1, 5, tiny_hf.WINDOW, 50)
"""Of prompts: within windows and chunks of 16 tokens, and beyond; with the new ones, all are."""


@pytest.fixture(scope="module", params=tiny_hf.CONFIGS)
def models(request, tmp_path_factory):
    """The model of `transformers`, and ours with its weights."""
    return tiny_hf.saved(request.param, tmp_path_factory.mktemp(request.param))


def random_prompts() -> list[list[int]]:
    torch.manual_seed(1)
    return [torch.randint(tiny_hf.VOCAB_SIZE, (n,)).tolist() for n in LENGTHS]


def test_greedy_tokens_are_those_of_transformers(models):
    hf, ours = models
    generator = Generator(ours)
    assert generator.uses_cache
    for prompt in random_prompts():
        [completion] = generator.generate([prompt], NEW_TOKENS, GREEDY)
        assert completion.tokens == tiny_hf.hf_greedy(hf, prompt, NEW_TOKENS)
        assert completion.finish_reason == "length"


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(top_p=0.9, seed=3)], ids=["greedy", "drawn"])
def test_a_batch_of_unequal_prompts_is_the_same_as_one_at_a_time(models, sampling):
    generator = Generator(models[1])
    prompts = random_prompts()
    together = generator.generate(prompts, NEW_TOKENS, sampling)
    for stream, prompt in enumerate(prompts):
        alone = generator.generate([prompt], NEW_TOKENS, sampling, streams=[stream])
        assert alone == [together[stream]]


def test_without_a_cache_the_tokens_are_the_same(models):
    generator = Generator(models[1])
    cached = generator.generate(random_prompts(), NEW_TOKENS, GREEDY)
    generator.uses_cache = False
    assert generator.generate(random_prompts(), NEW_TOKENS, GREEDY) == cached


def test_a_long_prompt_is_read_in_pieces(models, monkeypatch):
    generator, lengths = Generator(models[1]), set()
    whole = generator.generate(random_prompts(), NEW_TOKENS, GREEDY)
    monkeypatch.setattr("torchtitan.generation.cache.PIECE", 7)
    hook = models[1].register_forward_pre_hook(lambda _, args: lengths.add(args[0].shape[1]))
    assert generator.generate(random_prompts(), NEW_TOKENS, GREEDY) == whole
    hook.remove()
    assert max(lengths) == 7


@torch.no_grad()
def test_cached_logits_equal_those_of_the_whole_sequence(models):
    _, ours = models
    padding = torch.tensor([0, 7])
    tokens = torch.randint(tiny_hf.VOCAB_SIZE, (2, 60))
    cache = KVCache(ours, 60, padding)
    with cache.attached():
        # A prompt, a few tokens at a time, then one at a time.
        parts = tokens.split([30, 9, 5, *[1] * 16], dim=1)
        logits = torch.cat([cache.forward(part) for part in parts], dim=1)
    for row, pad in enumerate(padding.tolist()):
        whole = ours(tokens[row : row + 1, pad:])
        torch.testing.assert_close(logits[row : row + 1, pad:], whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_model_is_as_it_was_afterwards(models):
    _, ours = models
    tokens = torch.randint(tiny_hf.VOCAB_SIZE, (2, 20))
    before, state = ours(tokens), [sorted(vars(module)) for module in ours.modules()]
    Generator(ours).generate([[1, 2, 3]], 4, GREEDY)
    assert [sorted(vars(module)) for module in ours.modules()] == state
    assert torch.equal(ours(tokens), before)
