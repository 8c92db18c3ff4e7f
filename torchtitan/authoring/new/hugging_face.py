"""Reads a new model's sizes and names of tensors from a Hugging Face folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from torchtitan.errors import CheckpointError, ConfigError
from torchtitan.models.common.hf_config import WITHOUT_EFFECT
from torchtitan.models.common.state_dict import pattern_of
from torchtitan.models.from_hf import read_hf_config, train_spec_of_hf_folder
from torchtitan.protocols.model import BaseModelArgs
from torchtitan.protocols.train_spec import TrainSpec, get_train_spec
from torchtitan.tools.foreign_files import is_file, read_json
from torchtitan.tools.text import human

from .source import DEBUG_FLAVOR, OF_A_LIBRARY

DEFAULT_LIKE = "llama3"

ARGS = {
    "dim": ("hidden_size", "n_embd", "d_model"),
    "n_layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "n_heads": ("num_attention_heads", "n_head"),
    "n_kv_heads": ("num_key_value_heads", "num_attention_heads", "n_head"),
    "head_dim": ("head_dim",),
    "ffn_dim": ("intermediate_size", "n_inner", "ffn_dim"),
    "vocab_size": ("vocab_size",),
    "norm_eps": ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps"),
    "rope_theta": ("rope_theta", "rotary_emb_base"),
    "tie_word_embeddings": ("tie_word_embeddings",),
}
"""Field of our args -> its names in configs; the first one that exists is taken."""

_SYNONYMS = {
    "tok_embeddings.weight": ("embed_tokens", "wte", "embed_in", "word_embeddings"),
    "output.weight": ("lm_head", "embed_out"),
    "attention_norm.weight": ("input_layernorm", "ln_1", "attention_norm"),
    "ffn_norm.weight": ("post_attention_layernorm", "ln_2", "ffn_norm"),
    "norm.weight": ("norm", "ln_f", "final_layer_norm", "final_layernorm"),
    "attention.wq.weight": ("q_proj", "query", "wq"),
    "attention.wk.weight": ("k_proj", "key", "wk"),
    "attention.wv.weight": ("v_proj", "value", "wv"),
    "attention.wo.weight": ("o_proj", "out_proj", "dense", "wo"),
    "feed_forward.w1.weight": ("gate_proj", "w1"),
    "feed_forward.w2.weight": ("down_proj", "w2", "c_proj"),
    "feed_forward.w3.weight": ("up_proj", "w3"),
}
"""End of our name (the first that fits) -> the part before `.weight` in others' names."""


@dataclass
class Findings:
    """The findings in a Hugging Face folder."""

    folder: Path
    like: str
    """The model of the zoo to start from."""
    model_type: str
    flavor: str
    """Named after the number of parameters, such as `8B`."""
    args: BaseModelArgs
    args_source: str
    """`Llama3ModelArgs(dim=...)`, with the fields that differ from the defaults."""
    not_understood: dict[str, Any] = field(default_factory=dict)
    """Fields of `config.json` that the starting model does not know."""
    absent: dict[str, Any] = field(default_factory=dict)
    """Fields whose value means that a feature is absent: 0, null or false."""
    names: dict[str, str] = field(default_factory=dict)
    """Our name of a tensor -> theirs, as far as they could be matched; empty without weights."""
    without_counterpart: list[str] = field(default_factory=list)
    """Their tensors without a matching name of ours."""
    missing: list[str] = field(default_factory=list)
    """Our tensors without a matching name of theirs."""


def find_out(folder: Path, like: str) -> Findings:
    """Read `config.json`, and the names and shapes of tensors if there are weights.

    Args:
        like: the model to start from; "": the one that reads this config, else Llama 3.

    Raises:
        ConfigError: there is no `config.json`, or it is damaged.
    """
    try:
        config = read_hf_config(folder)
        shapes = _shapes(folder)
    except CheckpointError as error:
        raise ConfigError(f"--from-hf {folder}: {error}") from error
    like, spec, args, left = _start(folder, config, like)
    flavor = human(args.get_nparams_and_flops(1)[0]).replace(" ", "")
    source = _source_of(args)
    findings = Findings(
        folder,
        like,
        str(config.get("model_type")),
        flavor,
        args,
        source,
        not_understood={key: value for key, value in left.items() if value},
        absent={key: value for key, value in left.items() if not value},
    )
    names = getattr(spec.state_dict_adapter, "names", None)
    if shapes and names:
        _match_names(findings, spec, names, shapes)
    return findings


def _start(
    folder: Path, config: dict[str, Any], like: str
) -> tuple[str, TrainSpec, BaseModelArgs, dict[str, Any]]:
    """Return the model to start from, its TrainSpec, the args, and the config's unused fields."""
    try:
        name, spec = train_spec_of_hf_folder(folder)
        if like in ("", name) and name != OF_A_LIBRARY:
            return name, spec, spec.model_args, {}
    except CheckpointError:
        pass  # not a model of the zoo, so start from the one with the usual names
    like = like or DEFAULT_LIKE
    spec = get_train_spec(like, DEBUG_FLAVOR)
    args, left = _guess_args(type(spec.model_args), config)
    return like, spec, args, left


def _guess_args(
    args_cls: type[BaseModelArgs], config: dict[str, Any]
) -> tuple[BaseModelArgs, dict[str, Any]]:
    values, used = {}, set(WITHOUT_EFFECT)
    known = {item.name for item in fields(args_cls)}
    rope = config.get("rope_parameters") or {}
    if rope.keys() <= {"rope_theta", "rope_type"} and rope.get("rope_type") in (None, "default"):
        used.add("rope_parameters")
    if config.get("hidden_act") == "silu":
        used.add("hidden_act")
    flat = config | rope
    for name, theirs in ARGS.items():
        for key in theirs:
            if name in known and flat.get(key) is not None:
                values[name] = flat[key]
                used.add(key)
                break
    try:
        args = args_cls(**values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"config.json: {args_cls.__name__} rejects its sizes: {error}") from error
    if config.get("head_dim") == getattr(args, "head_dim", None):
        used.add("head_dim")
    return args, {key: value for key, value in config.items() if key not in used}


def _source_of(value: Any, indent: str = "    ") -> str:
    """Return Python source of a value; for a dataclass, with the non-default fields."""
    if not is_dataclass(value):
        return repr(value)
    inner = indent + "    "
    lines = []
    for item in fields(value):
        default = item.default if item.default_factory is MISSING else item.default_factory()
        if item.init and (current := getattr(value, item.name)) != default:
            lines.append(f"{inner}{item.name}={_source_of(current, inner)},\n")
    body = "".join(lines)
    return f"{type(value).__name__}(\n{body}{indent})" if lines else f"{type(value).__name__}()"


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return pattern of each tensor's name -> its shape; empty if the folder has no weights."""
    from torchtitan.components.checkpoint.safetensors_files import SafetensorsFile

    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with SafetensorsFile(path) as file:
            shapes |= {pattern_of(name): spec.shape for name, spec in file.specs.items()}
    if not shapes and is_file(index := folder / "model.safetensors.index.json", CheckpointError):
        names = read_json(index, CheckpointError).get("weight_map")
        if isinstance(names, dict):
            shapes = {pattern_of(name): () for name in names}  # weights are elsewhere
    return shapes


def _match_names(
    findings: Findings,
    spec: TrainSpec,
    names: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Fill in `names`, `missing` and `without_counterpart`."""

    model = spec.meta_model(findings.args)
    ours = {pattern_of(name): tuple(p.shape) for name, p in model.named_parameters()}
    experts = getattr(spec.state_dict_adapter, "expert_names", {})
    left = dict(shapes)
    for theirs in experts.values():
        left.pop(theirs, None)
    for name in names:
        theirs = names[name] if names[name] in left else _guess_name(name, ours.get(name), left)
        if theirs:
            findings.names[name] = theirs
            left.pop(theirs)
        elif name in ours:
            findings.missing.append(name)
        else:  # a part that this flavor does not have
            findings.names[name] = names[name]
    findings.without_counterpart = [f"{name} {list(shape)}" for name, shape in left.items()]


def _guess_name(
    name: str, shape: tuple[int, ...] | None, theirs: Mapping[str, tuple[int, ...]]
) -> str:
    """Return their only tensor with a usual name for ours and a fitting shape; "" if none."""
    levels = name.count("{}")
    fitting = [n for n, s in theirs.items() if s in ((), shape) and n.count("{}") == levels]
    words = next((w for end, w in _SYNONYMS.items() if name.endswith(end)), ())
    for word in words:
        found = [n for n in fitting if re.search(rf"(^|\.){word}\.weight$", n)]
        if len(found) == 1:
            return found[0]
    return ""


def adapter_table(findings: Findings) -> str:
    """Return the lines of the table `names`, with a comment on the remaining work."""
    lines = [f'        "{ours}": "{theirs}",' for ours, theirs in findings.names.items()]
    if findings.missing:
        lines.append(
            "        # TODO: the checkpoint has no tensor that looks like these of the model:"
        )
        lines += [f"        #   {name}" for name in findings.missing]
    if findings.without_counterpart:
        lines.append(
            "        # TODO: the model has no counterpart for these tensors of the checkpoint:"
        )
        lines += [f"        #   {name}" for name in findings.without_counterpart]
    return "\n".join(lines)
