"""What the recorders of memory, operations and collectives have in common."""

from __future__ import annotations

from typing import Any, Self
from unittest.mock import patch

from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode


class Recorder(TorchDispatchMode):
    """Within it, `record` is called after each operation on local tensors, real or fake.

    Not after those by which DTensor works out shapes: it does so with fake tensors of global size,
    on which nothing is computed in truth.
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
            return NotImplemented  # it comes back with the operations on its parts
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
