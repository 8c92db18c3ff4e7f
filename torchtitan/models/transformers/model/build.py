"""Build a causal language model of transformers, and prove that we can train it.

We call the library's own code for everything between the embedding and the output layer. So the
numbers on one device are right by construction. That its parts can be sharded, recomputed, compiled
and spread over pipeline stages one by one is proved by two trial passes without weights
(`check_body`, `check_layers`): what is not as we need it is refused, not trained wrongly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from torchtitan.errors import CheckpointError
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.common.hf_config import DEQUANTIZE, OtherArchitectureError, unsupported

from .longrope import fix_rotations

if TYPE_CHECKING:
    from .args import TransformersArgs

ATTENTION = "torchtitan"
"""Name under which transformers knows `_attend`."""
_NEEDED = ("vocab_size", "num_hidden_layers", "num_attention_heads", "tie_word_embeddings")
"""Fields of the config of each text model that we can train."""
_WITHOUT_EFFECT = {"position_ids", "use_cache", "logits_to_keep", "cache_position"}
"""What layers pass on to attention that changes nothing."""
_NEEDS_5 = "the model transformers needs the package of this name, version 5"


def class_name(fields: dict[str, Any]) -> str:
    """Return the name of transformers' class for the fields of a `config.json`.

    Raises:
        OtherArchitectureError: it has no such causal language model, or is not installed.
    """
    kind = str(fields.get("model_type"))
    try:
        from transformers import __version__
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    except ImportError as error:
        raise OtherArchitectureError(f"{_NEEDS_5}: {error}") from error
    if int(__version__.partition(".")[0]) < 5:
        raise OtherArchitectureError(f"{_NEEDS_5}, not {__version__}")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise OtherArchitectureError(
            f"config.json: model_type {kind!r} is no causal language model of transformers "
            f"{__version__}",
            tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        )
    found = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    return found if isinstance(found, str) else found[0]


def hf_config(fields: dict[str, Any]) -> Any:
    """Return transformers' config of the fields of a `config.json`.

    Raises:
        OtherArchitectureError: transformers has no such causal language model.
        CheckpointError: it has, but we cannot train it.
    """
    class_name(fields)
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    # These tokens have no effect here, and the defaults may be beyond the vocabulary.
    fields = fields | {"bos_token_id": 0, "eos_token_id": 0}
    kind = fields.pop("model_type")
    if quantization := fields.get("quantization_config"):
        raise CheckpointError(f"{unsupported('quantization_config', quantization)}. {DEQUANTIZE}")
    try:
        config = transformers.AutoConfig.for_model(kind, **fields)
        # Otherwise this token's row is no parameter like the others; some configs refuse None.
        vars(config)["pad_token_id"] = None
    except Exception as error:
        raise CheckpointError(f"config.json: transformers refuses it: {error}") from error
    if missing := [name for name in _NEEDED if not _has_one(config, name)]:
        parts = ", ".join(config.sub_configs)
        problem = f"has several parts ({parts})" if parts else f"has no single {missing[0]}"
        raise _refused(kind, problem)
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    for one in nested:
        rope_type = one.get("rope_type", "default")
        changes = rope_type == "dynamic" or (rope_type == "longrope" and one is not rope)
        if changes or rope_type not in {"default", *ROPE_INIT_FUNCTIONS}:
            raise unsupported("rope_type", rope_type)
    return config


def _has_one(config: Any, name: str) -> bool:
    try:
        return hasattr(config, name)
    except RuntimeError:  # its layers differ in it
        return False


def build_model(args: TransformersArgs) -> Any:
    """Return the `PreTrainedModel` on the meta device, with our attention.

    Raises:
        CheckpointError: transformers cannot build it.
    """
    config = hf_config(args.config)
    import transformers

    transformers.AttentionInterface.register(ATTENTION, _attend)
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(
                config, attn_implementation=ATTENTION, dtype=torch.float32
            )
    except Exception as error:
        problem = (
            "has attention of its own" if ATTENTION in error.args else f"cannot be built ({error})"
        )
        raise _refused(config.model_type, problem) from error
    fix_rotations(model, args.long_rotations)
    return model


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend by a module, which parallelism can replace; the first call, a trial, adds it.

    Args:
        query: `[batch, heads, seq, head_dim]`; key and value alike.

    Returns:
        `[batch, seq, heads, head_dim]`, and None for the weights.
    """
    if "inner_attention" not in module._modules:
        module.inner_attention = _attention_of(module, query, **options)
    out = module.inner_attention(query, key, value, attention_mask)
    return out.transpose(1, 2).contiguous(), None


def _attention_of(
    module: Any,
    query: torch.Tensor,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> ScaledDotProductAttention:
    unknown = [name for name, value in others.items() if value is not None]
    if extra := sorted(set(unknown) - _WITHOUT_EFFECT):
        raise CheckpointError(
            f"the model transformers cannot train this architecture: its attention has {extra[0]}, "
            "which ours has not"
        )
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise CheckpointError(
            "the model transformers trains causal models, but here a token sees later ones"
        )
    F.dropout(query, dropout)  # for `WithoutDropout`
    usual = scaling is None or math.isclose(scaling, query.shape[-1] ** -0.5)
    attention: Any = ScaledDotProductAttention(None if usual else scaling)
    attention.window = sliding_window
    attention.features = query.shape[1] * query.shape[-1]
    return attention


@dataclass
class Parts:
    """The modules of a model of transformers, by their part in ours."""

    embedding: nn.Module
    layers: nn.ModuleList
    norm: nn.Module
    output: nn.Linear
    names: dict[str, str]
    """Our name -> theirs, of `tok_embeddings`, `layers`, `norm` and `output`."""
    others: dict[str, nn.Module] = field(default_factory=dict)
    """Name -> module without parameters, such as the table of rotations."""


def parts_of(model: Any) -> Parts:
    """Find the parts of a model.

    Raises:
        CheckpointError: it has others.
    """
    body, output = model.base_model, model.get_output_embeddings()
    kind = model.config.model_type
    lists, embeddings, norms, others = {}, {}, {}, {}
    for name, module in ({} if body is model else dict(body.named_children())).items():
        if isinstance(module, nn.ModuleList):
            lists[name] = module
        elif isinstance(module, nn.Embedding):
            embeddings[name] = module
        elif "norm" in type(module).__name__.lower():
            norms[name] = module
        elif not any(True for _ in module.parameters()):
            others[name] = module
        else:
            raise _refused(kind, f"has {name} beside its layers")
    if [len(lists), len(embeddings), len(norms)] != [1, 1, 1] or not isinstance(output, nn.Linear):
        raise _refused(kind, "is not an embedding, a list of layers, a norm and an output layer")
    outer = [name for name, module in model.named_children() if module not in (body, output)]
    if outer:
        raise _refused(kind, f"has {outer[0]} beside its output layer")
    (embedding,), (layers,), (norm,) = embeddings, lists, norms
    if stacks := [name for name, p in lists[layers].named_parameters() if p.ndim > 2]:
        raise _refused(kind, f"has {stacks[0]} in its layers: experts or a convolution")
    prefix = model.base_model_prefix
    names = {
        "tok_embeddings": f"{prefix}.{embedding}",
        "layers": f"{prefix}.{layers}",
        "norm": f"{prefix}.{norm}",
        "output": next(name for name, module in model.named_modules() if module is output),
    }
    return Parts(embeddings[embedding], lists[layers], norms[norm], output, names, others)


def _refused(kind: str, problem: str) -> CheckpointError:
    return CheckpointError(
        f"model_type {kind!r} of transformers {problem}, so the model transformers cannot train "
        "it. Write a model of its own: `torchtitan new NAME --from-hf FOLDER` begins it"
    )


class View:
    """Stands in for `self` in a forward of transformers: its attributes, with other modules."""

    def __init__(self, module: nn.Module, **parts: Any) -> None:
        self._module = module
        vars(self).update(parts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def run_body(body: nn.Module, parts: dict[str, Any], hidden: torch.Tensor, **inputs: Any) -> Any:
    """Run the forward of a `PreTrainedModel` on hidden states `[batch, seq, dim]`, with `parts`.

    `parts` have the names that they have in `body`.
    """
    forward = type(body).forward
    return forward(View(body, **parts), inputs_embeds=hidden, use_cache=False, **inputs)


class WithoutDropout(TorchDispatchMode):
    """Refuses random numbers in a trial pass: layouts would draw others."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self._rates = {k: rate for k, rate in config.to_dict().items() if "drop" in k and rate}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            rates = ", ".join(f"{name} = {rate}" for name, rate in self._rates.items())
            raise CheckpointError(f"config.json: dropout is not supported. Set to 0: {rates}")
        return func(*args, **(kwargs or {}))


def check_body(model: Any, parts: Parts) -> None:
    """Prove that nothing is computed outside of the embedding, the layers, norm and output layer.

    They are replaced by stubs, each of which must get what the one before returned.

    Raises:
        CheckpointError: something is.
    """
    kind, body = model.config.model_type, model.base_model
    dim = parts.output.in_features
    hidden, normed, logits = (torch.empty(1, 2, dim, device="meta") for _ in range(3))
    got: list[torch.Tensor] = []

    def stub(returned: torch.Tensor) -> Any:
        def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            got.append(x)
            return returned

        return forward

    def passing(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return x

    stubs = {
        _last(parts.names["tok_embeddings"]): None,
        _last(parts.names["layers"]): [passing] * len(parts.layers),
        _last(parts.names["norm"]): stub(normed),
        **{name: stub(torch.empty_like(hidden)) for name in parts.others},
        **{name: part for name, part in parts.others.items() if isinstance(part, nn.Dropout)},
    }
    whole = View(
        model,
        **{
            model.base_model_prefix: lambda *tokens, **inputs: run_body(
                body, stubs, inputs["inputs_embeds"], position_ids=inputs.get("position_ids")
            ),
            _last(parts.names["output"]): stub(logits),
        },
    )
    positions = torch.zeros(1, 2, dtype=torch.long, device="meta")
    try:
        result = type(model).forward(whole, inputs_embeds=hidden, position_ids=positions)
    except CheckpointError:
        raise
    except Exception as error:
        raise _refused(kind, f"cannot be run in parts ({error})") from error
    before_norm, before_output = got[-2], got[-1]
    if before_norm is not hidden:
        raise _refused(kind, "computes between its embedding, layers and norm")
    # Usually a slice of all tokens.
    if before_output is not normed and before_output._base is not normed:
        raise _refused(kind, "computes between its norm and its output layer")
    if result.logits is not logits:
        raise _refused(kind, "computes after its output layer")


@dataclass
class LayerCalls:
    """How a body calls its layers, found by `check_layers`."""

    windows: list[int | None]
    """The window of each layer, in tokens; None: it sees all tokens before."""
    features: int
    """Of a token's queries, in all layers."""
    by_keyword: dict[str, str | None]
    """Name of a module of the layers -> keyword by which it gets the hidden states, if any."""


def check_layers(model: Any, parts: Parts) -> LayerCalls:
    """Give each layer our attention, and prove that it uses it once, with the mask it should have.

    Raises:
        CheckpointError: a layer does not, or its attention is of another kind.
    """
    kind, dim = model.config.model_type, parts.output.in_features
    by_keyword: dict[str, str | None] = {}

    def see(name: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        tensors = [key for key, value in kwargs.items() if isinstance(value, torch.Tensor)]
        by_keyword[name] = None if args else next(iter(tensors), None)

    hooks = [
        module.register_forward_pre_hook(partial(see, name), with_kwargs=True)
        for layer in parts.layers
        for name, module in layer.named_children()
    ]
    own = {
        _last(parts.names["tok_embeddings"]): None,
        _last(parts.names["layers"]): list(parts.layers),
        _last(parts.names["norm"]): parts.norm,
        **parts.others,
    }

    def run(mask: Any) -> None:
        with torch.device("meta"):
            hidden, positions = torch.empty(1, 2, dim), torch.zeros(1, 2, dtype=torch.long)
            run_body(model.base_model, own, hidden, position_ids=positions, attention_mask=mask)

    try:
        run(None)  # the attention of each layer adds its module
    except CheckpointError:
        raise
    except Exception as error:
        raise _refused(kind, f"cannot run without weights ({error})") from error
    finally:
        for hook in hooks:
            hook.remove()
    attentions: list[Any] = []
    for number, layer in enumerate(parts.layers):
        found = [m for m in layer.modules() if isinstance(m, ScaledDotProductAttention)]
        if len(found) != 1:
            raise _refused(kind, f"mixes tokens in layer {number} by other means than attention")
        attentions += found
    windows: list[int | None] = [attention.window for attention in attentions]

    masks = {w: torch.ones(1, 1, 2, 2, dtype=torch.bool, device="meta") for w in set(windows)}
    seen: list[Any] = []
    hooks = [a.register_forward_pre_hook(lambda _, args: seen.append(args[3])) for a in attentions]
    run(masks_for_body(model.config, windows, masks))
    for hook in hooks:
        hook.remove()
    if len(seen) != len(windows):
        raise _refused(kind, "attends several times in a layer")
    if any(mask is not masks[w] for mask, w in zip(seen, windows, strict=True)):
        raise _refused(kind, "changes the attention mask")
    return LayerCalls(windows, sum(attention.features for attention in attentions), by_keyword)


def masks_for_body(config: Any, windows: list[int | None], masks: dict[int | None, Any]) -> Any:
    """Return `attention_mask` of a body: a mask, or one for each type of layer."""
    if len(set(windows)) == 1:
        return masks[windows[0]]
    return {kind: masks[w] for kind, w in zip(config.layer_types, windows, strict=True)}


def _last(name: str) -> str:
    return name.rpartition(".")[2]
