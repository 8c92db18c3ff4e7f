"""Defines the model under test, as passed to every check: small enough to pickle."""

from __future__ import annotations

import copy
import inspect
from bisect import bisect_left
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from torchtitan.components.data_loader import may_add_inputs
from torchtitan.components.loss import build_loss
from torchtitan.components.model_inputs import needed_inputs
from torchtitan.config import JobConfig, load_config
from torchtitan.distributed.init import initialize_weights
from torchtitan.errors import ConfigError, did_you_mean
from torchtitan.models.plugins import load_plugins
from torchtitan.protocols.model import BaseModelArgs, ModelProtocol
from torchtitan.protocols.train_spec import (
    MODEL_REGISTRY,
    BrokenModel,
    TrainSpec,
    get_train_spec,
    model_flavors,
)
from torchtitan.tools.foreign_files import is_folder
from torchtitan.tools.user_module import NoPackageError

from .batches import Example, OwnBatches, OwnLoss, batch_of_texts, random_example
from .check import NotApplicableError
from .probe import vary_constants


@dataclass
class Subject:
    """A model and a flavor, and how checks should use them."""

    name: str
    flavor: str
    folder: Path
    """For files that checks leave to others: references, checkpoints."""
    custom_import: str = ""
    """`job.custom_import`."""
    hf_path: Path | None = None
    """Folder of a Hugging Face checkpoint of this model, to compare with."""
    seq_len: int = 64
    seed: int = 0

    def __getstate__(self) -> dict[str, Any]:
        """Pickle only the fields, since classes made by a factory cannot be pickled."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def has_float64(self) -> bool:
        """Whether no check has found that the model cannot compute in float64."""
        return not (self.folder / "float32").exists()

    def use_float32(self) -> None:
        """Make `has_float64` false in checks that begin later."""
        (self.folder / "float32").touch()

    @cached_property
    def spec(self) -> TrainSpec:
        """The model's TrainSpec. Raises `ConfigError` if there is no such model or flavor."""
        load_plugins(self.custom_import)
        return get_train_spec(self.name, self.flavor)

    @cached_property
    def args(self) -> BaseModelArgs:
        """The model's arguments, for one process."""
        return self.spec.updated_args(self.config())

    def at_most(self, wanted: int) -> int:
        """Return `wanted`, or the most tokens that `max_seq_len` and `update_from_config` allow."""
        longest = getattr(self.args, "max_seq_len", None)
        wanted = min(wanted, longest) if isinstance(longest, int) else wanted
        if wanted <= self.length or self.takes(wanted):
            return wanted
        longer = range(self.length + 1, wanted)
        return self.length + bisect_left(longer, True, key=lambda n: not self.takes(n))

    def takes(self, seq_len: int) -> bool:
        """Return whether `update_from_config` allows `training.seq_len = seq_len`."""
        args = copy.deepcopy(self.spec.model_args)  # a faulty update_from_config would change them
        try:
            args.update_from_config(self.config(f"--training.seq_len={seq_len}"))
        except ConfigError:
            return False
        return True

    def config(self, *options: str) -> JobConfig:
        """Return a job of the model in float32, with the options of `torchtitan train`."""
        return self._job(f"--training.seq_len={self.length}", *options)

    def _job(self, *options: str) -> JobConfig:
        return load_config(
            [
                f"--model.name={self.name}",
                f"--model.flavor={self.flavor}",
                f"--job.custom_import={self.custom_import}",
                f"--job.dump_folder={self.folder}",
                f"--debug.seed={self.seed}",
                "--training.mixed_precision_param=float32",
                "--activation_checkpoint.mode=none",
                *options,
            ]
        )

    def build(self, seed: int | None = None) -> ModelProtocol:
        """Build the whole model on the CPU, with weights from the seed, in evaluation mode."""
        model = self.spec.meta_model(self.args)
        initialize_weights(model, self.seed if seed is None else seed, torch.device("cpu"))
        return model.eval()

    def build_varied(self) -> ModelProtocol:
        """Call `build`, and add noise to zeros and constant weights, which could hide mistakes."""
        model = self.build()
        vary_constants(model, self.seed)
        return model

    @cached_property
    def own_loss(self) -> OwnLoss | None:
        """The author's loss; None if the model uses the library's."""
        build = self.spec.build_loss_fn
        return None if build is build_loss else OwnLoss(lambda: build(self.config()))

    @cached_property
    def own_batches(self) -> OwnBatches | None:
        """Batches of the model's loader; None if it is the library's, which gives texts."""
        if not may_add_inputs(self.spec.build_dataloader_fn):
            return None
        return OwnBatches(self.spec, self._job, self.seq_len)

    @cached_property
    def own_documents(self) -> OwnBatches:
        """Batches under `training.document_mask`, of a model that has its own loader."""
        return OwnBatches(self.spec, self._job, self.length, "--training.document_mask")

    def close(self) -> None:
        """Make the loaders stop their background work."""
        for name in ("own_batches", "own_documents"):
            if (batches := self.__dict__.get(name)) is not None:
                batches.close()

    @property
    def length(self) -> int:
        """`training.seq_len` of all jobs: `seq_len`, or the length given by an own loader."""
        return self.own_batches.seq_len if self.own_batches else self.seq_len

    @property
    def reads_text(self) -> bool:
        """Whether the model reads random tokens `[batch, seq]`.

        It does unless its own loader gives something else. If the loader gives nothing here, it
        does if it has a vocabulary.
        """
        if self.own_batches is None:
            return True
        has_vocabulary = isinstance(getattr(self.args, "vocab_size", None), int)
        return has_vocabulary and (bool(self.own_batches.error) or self.own_batches.is_text)

    @property
    def later_tokens(self) -> int:
        """The number of tokens after each one that the model's loader adds to a text, if any."""
        own = self.own_batches
        return own.later_tokens if own and self.reads_text and not own.error else 0

    def require_text(self) -> None:
        """Raise `NotApplicableError` for a model that reads something else."""
        if not self.reads_text:
            assert self.own_batches is not None
            raise NotApplicableError(
                f"applies only to token ids [batch, seq]; the data loader of {self.name} gives "
                f"{self.own_batches.describe()}"
            )

    def require_ids(self) -> None:
        """Raise `NotApplicableError` unless the model can be given token ids `[batch, seq]` alone.

        A masked model can, whose loader gives more.
        """
        own = self.own_batches
        parameters = list(inspect.signature(self.spec.model_cls.forward).parameters.values())
        if needed_inputs(parameters[2:]) or (own and not own.error and not own.has_ids):
            self.require_text()

    @property
    def vocab_size(self) -> int:
        """The size of the vocabulary. Raises `ConfigError` if the arguments have none."""
        size = getattr(self.args, "vocab_size", None)
        if not isinstance(size, int):
            raise ConfigError(
                f"{type(self.args).__name__} has no vocab_size, so no tokens can be generated for "
                "it"
            )
        return size

    def tokens(self, batch: int, seq: int | None = None, seed: int = 0) -> torch.Tensor:
        """Random tokens, `[batch, seq]` int64; `seq_len` tokens by default.

        Raises:
            NotApplicableError: the model reads something else.
        """
        self.require_text()
        return self.random_tokens(batch, seq, seed)

    def random_tokens(self, batch: int, seq: int | None = None, seed: int = 0) -> torch.Tensor:
        """Return what `tokens` returns, for any model that has a vocabulary."""
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + seed)
        return torch.randint(self.vocab_size, (batch, seq or self.length), generator=generator)

    def example(self, batch: int, seq: int | None = None, seed: int = 0) -> Example:
        """Return an input of the model: `tokens`, or a batch of its own loader if it reads no text.

        To tokens, `later_tokens` are added. The batch has the loader's length and at most 8 rows.

        Raises:
            NotApplicableError: the loader cannot be built here, or ends.
        """
        if self.later_tokens:
            stream = self.tokens(batch, (seq or self.length) + 1, seed)
            return self.example_of(stream)
        if self.reads_text:
            return random_example(self.tokens(batch, seq, seed), self.own_loss)
        assert self.own_batches is not None
        self.require_own()
        return self.own_batches.example(batch, 1 + seed)

    def example_by_token(self, seed: int = 0) -> Example:
        """Return a row of token ids `[1, seq, ...]`, whose places are those of the output: a text
        alone, or a row of the model's own loader.

        Raises:
            NotApplicableError: the loader gives something else.
        """
        if self.reads_text:
            return random_example(self.tokens(1, seed=seed))
        example = self.example(1, seed=seed)
        tokens = example.tokens
        if tokens.dtype != torch.int64 or example.labels.shape[:2] != tokens.shape[:2]:
            self.require_text()
        return example

    def example_of(self, stream: torch.Tensor, document_ids: Any = None) -> Example:
        """Return texts with `later_tokens`; for the arguments see `batch_of_texts`."""
        batch = batch_of_texts(stream, self.later_tokens, document_ids)
        tokens, labels = batch.pop("tokens"), batch.pop("labels")
        return Example(tokens, labels, batch, self.own_loss)

    def require_own(self) -> None:
        """Raise `NotApplicableError` if the model needs batches that its loader does not give."""
        if self.own_batches and self.own_batches.error and not self.reads_text:
            raise NotApplicableError(f"no batches, see contract.forward: {self.own_batches.error}")


def subject_of(
    name: str,
    flavor: str,
    folder: Path,
    custom_import: str = "",
    hf_path: str | Path | None = None,
) -> Subject:
    """Import a model, and return it in a flavor: by default `debugmodel`, or the only one.

    A module that cannot be imported is left to the check `contract.import`, and a factory that
    fails to `contract.spec`.

    Raises:
        ConfigError: there is no such model, flavor or folder, or several flavors to choose from; or
            the module is a folder with nothing to import.
    """
    hf_path = None if hf_path is None else Path(hf_path).expanduser().resolve()
    if hf_path is not None and not is_folder(hf_path, ConfigError):
        raise ConfigError(f"--hf {hf_path}: no such folder")
    try:
        load_plugins(custom_import)
    except NoPackageError:
        raise
    except ConfigError:
        return Subject(name, flavor, folder, custom_import, hf_path)
    require_model(name)
    subject = Subject(name, flavor or _default_flavor(name), folder, custom_import, hf_path)
    try:
        subject.spec  # noqa: B018
    except ConfigError:  # no such flavor
        raise
    except Exception:  # the author's mistake
        pass
    return subject


def require_model(name: str) -> None:
    """Raise `ConfigError` if no imported module has registered the model, or its import fails."""
    if name not in MODEL_REGISTRY:
        raise ConfigError(
            f"no model {name!r}.{did_you_mean(name, MODEL_REGISTRY)} Register a model outside "
            "torchtitan with --custom-import MODULE (in conformance_tests: custom_import)"
        )
    if isinstance(broken := MODEL_REGISTRY[name], BrokenModel):
        raise ConfigError(broken.problem)


def _default_flavor(name: str) -> str:
    """Return `debugmodel` if the model has it, else the only flavor.

    Raises:
        ConfigError: there are several other flavors, so the user must choose.
    """
    flavors = model_flavors(name)
    if "debugmodel" in flavors or not flavors:
        return "debugmodel"
    if len(flavors) == 1:
        return flavors[0]
    raise ConfigError(
        f"{name} has no flavor debugmodel, so choose a small one with --flavor: "
        f"{', '.join(flavors)}. With a debugmodel, every check is fast"
    )
