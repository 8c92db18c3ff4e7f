"""Read a Hugging Face model's `config.json`, refusing unknown fields, and write it."""

from __future__ import annotations

from typing import Any, get_args

from torchtitan.errors import CheckpointError

from .ranges import NonNegativeFloat, RopeTheta, Size

WITHOUT_EFFECT = frozenset(
    {
        "_attn_implementation_autoset",  # written by transformers 4.47 to 4.51
        "_class_name",
        "_diffusers_version",
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "initializer_range",  # training starts from our own initialisation or from weights
        "max_position_embeddings",  # rotary positions are unlimited
        "model_type",
        "output_router_logits",
        "pad_token_id",
        "router_aux_loss_coef",  # of a training run
        "router_z_loss_coef",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_cache",
    }
)
"""Fields that do not affect what a model computes."""

DEQUANTIZE = "First run `torchtitan convert dequantize FOLDER OUT`, which reads FP8 and MXFP4"

_REQUIRED = object()
_ROTARY = ("rope_theta", "rope_parameters", "rope_scaling")


class OtherArchitectureError(CheckpointError):
    """A `config.json` belongs to another model than the one that tried to read it.

    Args:
        model_types: values of the field `key` that the model can read.
    """

    def __init__(self, message: str, model_types: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.model_types = model_types


class HuggingFaceConfig:
    """The fields of a `config.json`. Ask for each once, in a `with` block that builds the args.

    Args:
        fields: the parsed file.
        model_types: values of the field `key` that the caller can read.
        key: the field that names the architecture, `_class_name` in files of diffusers.

    Raises:
        OtherArchitectureError: the file is of another architecture.
        CheckpointError: the weights are quantized; or at the end of the block, if the args are
            refused (`ValueError`), or a field that may have an effect was not asked for.
    """

    def __init__(self, fields: dict[str, Any], *model_types: str, key: str = "model_type") -> None:
        self._fields = dict(fields)
        self.model_type = self._fields.get(key)
        if self.model_type not in model_types:
            expected = " or ".join(map(repr, model_types))
            raise OtherArchitectureError(
                f"config.json: {key} is {self.model_type!r}, not {expected}", model_types
            )
        if quantization := self._fields.pop("quantization_config", None):
            problem = unsupported("quantization_config", quantization)
            raise CheckpointError(f"{problem}. {DEQUANTIZE}")

    def __enter__(self) -> HuggingFaceConfig:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, ValueError):  # sizes that do not fit together
            raise CheckpointError(f"config.json: {error}") from error
        left = sorted(self._fields.keys() - WITHOUT_EFFECT)
        if left and error is None:
            fields = ", ".join(f"{name} = {self._fields[name]!r}" for name in left)
            raise CheckpointError(f"config.json: unknown fields: {fields}")

    def take(self, *names: str, kind: Any, default: Any = _REQUIRED) -> Any:
        """Return the value of a field, which has several names if it was renamed.

        If there is a default, it also replaces null.

        Args:
            kind: a type, or one of those with a range in `ranges.py`.

        Raises:
            CheckpointError: the field is missing without a default, is not of type `kind`, or is
                out of its range.
        """
        present = [(name, self._fields.pop(name)) for name in names if name in self._fields]
        if not present:
            if default is _REQUIRED:
                raise CheckpointError(f"config.json lacks {names[0]!r}")
            return default
        name, value = present[0]
        if value is None and default is not _REQUIRED:
            return default
        base = next(iter(get_args(kind)), kind)
        if base is float and type(value) is int:
            value = float(value)
        if type(value) is not base:
            raise CheckpointError(
                f"config.json: {name} = {value!r} must be of type {base.__name__}"
            )
        require_in_range(name, value, kind)
        return value

    def take_decoder(self, tied: bool = False) -> dict[str, Any]:
        """Return our args for the fields of `hf_fields`. `tied`: default `tie_word_embeddings`."""
        self.require("attention_dropout", 0.0)
        return {
            "dim": self.take("hidden_size", kind=Size),
            "n_layers": self.take("num_hidden_layers", kind=Size),
            "n_heads": self.take("num_attention_heads", kind=Size),
            "vocab_size": self.take("vocab_size", kind=Size),
            "norm_eps": self.take("rms_norm_eps", kind=NonNegativeFloat),
            "tie_word_embeddings": self.take("tie_word_embeddings", kind=bool, default=tied),
        }

    def require(self, name: str, *supported: Any) -> None:
        """Accept the field `name` if it is missing or has one of the given values.

        Raises:
            CheckpointError: it has another value.
        """
        value = self._fields.pop(name, supported[0])
        if value not in supported:
            raise unsupported(name, value)

    def ignore(self, *names: str) -> None:
        """Skip fields that have no effect, given the values of others."""
        for name in names:
            self._fields.pop(name, None)

    def take_rope(self) -> tuple[float, dict[str, Any] | None]:
        """Return the rotary base, and the scaling as a dict with `rope_type`; None: no scaling.

        Since transformers 5, one field `rope_parameters` holds both. Values that occur twice must
        be equal, because which one counts depends on the program that reads them.

        Raises:
            CheckpointError: they are not, or a field is not of the right type.
        """
        fields = {name: self._fields[name] for name in _ROTARY if self._fields.get(name)}
        said = []
        for name in ("rope_parameters", "rope_scaling"):
            scaling = dict(self.take(name, kind=dict, default=None) or {})
            if scaling:
                old_name = scaling.pop("type", scaling.get("rope_type", "default"))
                if scaling.setdefault("rope_type", old_name) != old_name:
                    raise _contradictory(fields)
                if scaling.get("rope_theta") is None:
                    scaling["rope_theta"] = fields.get("rope_theta")
                said.append(scaling)
        if any(scaling != said[0] for scaling in said):
            raise _contradictory(fields)
        scaling = said[0] if said else {}
        theta = scaling.pop("rope_theta", None)
        if theta is not None:
            if fields.setdefault("rope_theta", theta) != theta:
                raise _contradictory(fields)
            self._fields["rope_theta"] = theta
        theta = self.take("rope_theta", kind=RopeTheta)
        return theta, None if scaling.get("rope_type", "default") == "default" else scaling


def unsupported(name: str, value: Any) -> CheckpointError:
    """Return the error for a field whose value we do not implement."""
    return CheckpointError(f"config.json: {name} = {value!r} is not supported")


def require_numbers(name: str, fields: dict[str, Any], *keys: str) -> None:
    """Raise `CheckpointError` if one of the entries `keys` of the field `name` is no number."""
    for key in keys:
        if key in fields and type(fields[key]) not in (int, float):
            raise CheckpointError(f"config.json: {name}: {key} = {fields[key]!r} must be a number")


def require_in_range(name: str, value: float, kind: Any) -> None:
    """Raise `CheckpointError` if the number in the field `name` is out of the range of `kind`, a
    type as `take` gets it."""
    for allowed in get_args(kind)[1:]:
        if not allowed.allows(value):
            raise CheckpointError(f"config.json: {name} = {value!r} must be {allowed}")


def _contradictory(fields: dict[str, Any]) -> CheckpointError:
    shown = ", ".join(f"{name} = {value!r}" for name, value in fields.items())
    return CheckpointError(f"config.json contradicts itself: {shown}. Remove one of them")


def hf_fields(args: Any, model_type: str, architecture: str) -> dict[str, Any]:
    """Return the `config.json` fields that all our models have.

    Rotary positions are written as in published files, as `rope_theta` and `rope_scaling`, which
    transformers 4 and 5 and other programs read.

    Args:
        args: of a decoder, with our usual names.
        model_type: transformers' name of the model.
        architecture: its class in transformers.
    """
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": args.vocab_size,
        "hidden_size": args.dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "attention_dropout": 0.0,
        "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "tie_word_embeddings": args.tie_word_embeddings,
        "use_cache": True,
    }
