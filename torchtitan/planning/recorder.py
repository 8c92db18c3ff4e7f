"""The common base of the recorders of memory, operations and collectives."""

from __future__ import annotations

from typing import Any, Self
from unittest.mock import patch

from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode


class Recorder(TorchDispatchMode):
    """Calls `record` after each operation on local tensors, real or fake, while it is entered.

    Operations by which DTensor propagates shapes are left out: they use fake tensors of global
    size, on which nothing is really computed.
    """

    def __init__(self) -> None:
        super().__init__()
        self._paused = False

    def record(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        raise NotImplementedError

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if DTensor in types:
            return NotImplemented  # DTensor then dispatches the operations on its local parts
        result = func(*args, **(kwargs or {}))
        if not self._paused:
            self.record(func, args, kwargs or {}, result)
        return result

    def __enter__(self) -> Self:
        propagate = ShardingPropagator._propagate_tensor_meta_non_cached

        def propagate_unseen(*args: Any, **kwargs: Any) -> Any:
            self._paused = True
            try:
                return propagate(*args, **kwargs)
            finally:
                self._paused = False

        name = "_propagate_tensor_meta_non_cached"
        self._pausing = patch.object(ShardingPropagator, name, propagate_unseen)
        self._pausing.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._pausing.stop()
        super().__exit__(*error)
