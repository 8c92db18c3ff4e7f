"""The contract for exchanging weights with Hugging Face checkpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torchtitan.protocols.model import BaseModelArgs


class BaseStateDictAdapter(ABC):
    """Maps state dicts of a model to and from the Hugging Face layout.

    Both directions are pure maps of keys and tensors. They must work on plain tensors and on
    DTensors alike, so that sharded models exchange weights with no full copy on any rank.
    """

    def __init__(self, model_args: BaseModelArgs, hf_assets_path: str | Path | None = None) -> None:
        self.model_args = model_args
        self.hf_assets_path = Path(hf_assets_path) if hf_assets_path else None

    def check_names(self, names: Iterable[str]) -> None:
        """Refuse a checkpoint of a kind that cannot be read, judging by its tensors' names.

        Raises:
            CheckpointError: the checkpoint is of such a kind.
        """
        return

    def copies(self) -> dict[str, str]:
        """Return redundant tensors that a file may contain: name -> name of the equal tensor."""
        return {}

    def _convert_key_to_hf(self, key: str) -> str:
        """The Hugging Face name of one of our tensors, for adapters that only rename."""
        raise NotImplementedError(f"{type(self).__name__} must define _convert_key_to_hf(key)")

    def _convert_key_from_hf(self, key: str) -> str:
        """The inverse of `_convert_key_to_hf`."""
        raise NotImplementedError(f"{type(self).__name__} must define _convert_key_from_hf(key)")

    @abstractmethod
    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Convert our state dict to the Hugging Face format."""

    @abstractmethod
    def from_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Convert a Hugging Face state dict to ours."""
