"""Context parallelism: several ranks share each sequence.

`shard_batch` returns a rank's part of a batch, and `apply_cp` lets the model's attention see the
other ranks' keys. All else in a transformer treats tokens one by one, so it needs no change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh

from torchtitan.config.load import fail, origin
from torchtitan.distributed.ring_attention import ring_attention
from torchtitan.distributed.sequence_shards import SequenceShards
from torchtitan.errors import ContextParallelError
from torchtitan.protocols.model import layers_of
from torchtitan.tools.logging import rank0
from torchtitan.tools.text import few

if TYPE_CHECKING:
    from torchtitan.config import JobConfig
    from torchtitan.models.common.attention import (
        AttentionMask,
        CausalMask,
        ScaledDotProductAttention,
    )

Attend = Callable[..., torch.Tensor]
"""(q, k, v, mask) -> output, as `ScaledDotProductAttention`."""
RequirePart = Callable[[nn.Module, int], None]
"""Takes a mask or attention, and the number of tokens that it got."""


def shard_batch(
    batch: dict[str, torch.Tensor], cp_mesh: DeviceMesh, job_config: JobConfig
) -> dict[str, torch.Tensor]:
    """Return this rank's part of a batch.

    Args:
        batch: tensors `[batch, seq, ...]`, the same on all ranks of the mesh, with `positions`
            counted in the whole sequence. `seq` is a multiple of `2 * cp`.

    Returns:
        Tensors `[batch, seq / cp, ...]`.
    """
    shards = sequence_shards(cp_mesh, job_config)
    return {name: shards.shard(tensor, 1) for name, tensor in batch.items()}


def apply_cp(
    model: nn.Module,
    cp_mesh: DeviceMesh,
    job_config: JobConfig,
    attended: Collection[int] | None = None,
) -> None:
    """Make attention cover whole sequences of which each rank of `cp_mesh` has a part, in place.

    Replaces the `forward` of each `CausalMask` and `ScaledDotProductAttention` in the model. Call
    it before activation checkpointing and compilation.

    Args:
        attended: lengths of whole sequences that attention sees, if it is not only
            `training.seq_len`: that of another of the model's `sequence_inputs`, or of several that
            it joins where all tokens see each other.

    Raises:
        ConfigError: the model's attention does not use these modules, or follows a rule that they
            or `parallelism.context_parallel_method` do not support; or the model has a convolution
            over the sequence or a recurrent module of PyTorch. Those of its own are not recognized:
            layers without attention get a warning, unless a module has `sequence_shards` for an
            exchange of its own.
    """
    # Imported here because models import this module.
    from torchtitan.models.common.attention import CausalMask, ScaledDotProductAttention

    masks = [m for m in model.modules() if isinstance(m, CausalMask)]
    attentions = [m for m in model.modules() if isinstance(m, ScaledDotProductAttention)]
    _refuse_other_models(model, masks, attentions, job_config)
    shards = sequence_shards(cp_mesh, job_config)
    lengths = [job_config.training.seq_len] if attended is None else attended
    require_part = partial(_require_part, [n // shards.size for n in lengths], job_config)
    for mask in masks:
        mask.forward = _shared_mask(mask, shards, require_part, job_config)
    for attention in attentions:
        attend = _METHODS[job_config.parallelism.context_parallel_method](attention, shards)
        attention.forward = _of_whole_parts(attention, attend, require_part)
    cast(Any, model).applied_context_parallel = True


def _refuse_other_models(
    model: nn.Module,
    masks: list[CausalMask],
    attentions: list[ScaledDotProductAttention],
    job_config: JobConfig,
) -> None:
    """Raise `ConfigError` if the ranks cannot share the model's sequences, or not by this method.

    Warn about layers in which this cannot be seen.
    """
    from torchtitan.models.common.attention import CausalMask, ScaledDotProductAttention

    refuse = partial(fail, job_config)
    degree, method = "parallelism.context_parallel_degree", "parallelism.context_parallel_method"
    name, layers = job_config.model.name, layers_of(model).items()
    unmasked = any(a.causal for a in attentions) and not masks
    without = [f"layers.{number}" for number, layer in layers if not _sees_other_ranks(layer)]
    if unmasked or (layers and len(without) == len(layers)):
        refuse(
            degree,
            f"{name} does not use CausalMask and ScaledDotProductAttention of "
            "torchtitan.models.common.attention, so its attention cannot be split over ranks. Set "
            "it to 1",
        )
    # Without a mask, ranks leave out the keys that a causal query does not see.
    own_masks = any(type(mask) is not CausalMask for mask in masks)
    all_causal = not own_masks and all(a.causal for a in attentions)
    if attentions and all_causal and getattr(model, "sees_later_tokens", False):
        refuse(
            degree,
            f"{name} sets sees_later_tokens, but its ScaledDotProductAttention is causal. Where "
            "queries see all keys, use ScaledDotProductAttention(causal=False) without a mask",
        )
    if mixers := [name for name, m in model.named_modules() if _mixes_tokens(m)]:
        refuse(
            degree,
            f"{name} mixes tokens in {mixers[0]}, which would see only a rank's part of each "
            "sequence. Set it to 1, and leave apply_cp out of the model's parallelize_fn",
        )
    if without:
        rank0.warning(
            "%s: %s has no ScaledDotProductAttention in %s. If they mix tokens by other means, as "
            "a recurrence does, each sees only a rank's part of a sequence, and the numbers are "
            "wrong: `torchtitan verify %s --only layouts.cp2` compares with one process",
            *(origin(job_config, degree), name, few(without), name),
        )
    if job_config.parallelism.context_parallel_method != "ring":
        return
    # The ring's kernels use the default scale and ignore everything that a subclass adds.
    if any(type(a) is not ScaledDotProductAttention or a.scale is not None for a in attentions):
        refuse(
            method,
            f"ring attention supports only scaled dot product attention, but {name} has layers "
            "with a custom scale or extra terms. Use 'allgather' or 'ulysses'",
        )
    if not all_causal or any(mask.window or mask.chunk for mask in masks):
        refuse(
            method,
            f"ring attention supports only plain causal attention, but {name} has layers that "
            "attend in windows, in chunks, to later tokens, or by a mask of its own. Use "
            "'allgather' or 'ulysses'",
        )


def _mixes_tokens(module: nn.Module) -> bool:
    """Return whether a module of PyTorch mixes tokens. A subclass may exchange the parts itself."""
    if type(module) is nn.Conv1d:
        return module.kernel_size != (1,)
    return type(module) in (nn.RNN, nn.LSTM, nn.GRU)


def _sees_other_ranks(layer: nn.Module) -> bool:
    """Return whether a layer has attention, or `SequenceShards` for an exchange of its own."""
    from torchtitan.models.common.attention import ScaledDotProductAttention

    return any(
        isinstance(part, ScaledDotProductAttention | SequenceShards)
        for module in layer.modules()
        for part in (module, *vars(module).values())
    )


def require_applied_cp(model_parts: list[nn.Module], job_config: JobConfig) -> None:
    """Refuse a model whose attention would stay within the parts of a sequence.

    Raises:
        ConfigError: its `parallelize_fn` did not call `apply_cp`.
    """
    if all(hasattr(part, "applied_context_parallel") for part in model_parts):
        return
    fail(
        job_config,
        "parallelism.context_parallel_degree",
        f"the parallelize_fn of {job_config.model.name} does not support context parallelism: it "
        "does not call torchtitan.distributed.context_parallel.apply_cp. Set it to 1",
    )


def sequence_shards(cp_mesh: DeviceMesh, job_config: JobConfig) -> SequenceShards:
    """Return which part of each sequence a rank of the mesh has."""
    # Ulysses attends to whole sequences for some heads, which is balanced in any order.
    balanced = job_config.parallelism.context_parallel_method != "ulysses"
    return SequenceShards(cp_mesh, balanced)


def _shared_mask(
    mask: CausalMask, shards: SequenceShards, require_part: RequirePart, job_config: JobConfig
) -> Callable[..., AttentionMask]:
    """Return the forward of a mask with all keys and the queries that this rank attends for."""
    whole, method = mask.forward, job_config.parallelism.context_parallel_method

    def forward(
        seq_len: int, document_ids: torch.Tensor | None, device: torch.device
    ) -> AttentionMask:
        require_part(mask, seq_len)
        seq_len = seq_len * shards.size
        if document_ids is not None:
            document_ids = shards.gather(document_ids, 1)
        queries = None
        if method == "allgather":
            queries = shards.shard(torch.arange(seq_len, device=device), 0)
        return whole(seq_len, document_ids, device, queries)

    return forward


def _of_whole_parts(
    attention: ScaledDotProductAttention, attend: Attend, require_part: RequirePart
) -> Attend:
    """Return `attend`, which refuses queries or keys that are no part of a sequence."""

    def forward(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: AttentionMask = None
    ) -> torch.Tensor:
        require_part(attention, q.shape[2])
        if attention.causal:  # other keys may be of no sequence
            require_part(attention, k.shape[2])
        return attend(q, k, v, mask)

    return forward


def _require_part(
    parts: Collection[int], job_config: JobConfig, module: nn.Module, tokens: int
) -> None:
    """Refuse a model that attends to other tokens than a rank's part of a sequence."""
    if not module.training or tokens in parts:  # a validator may have sequences of another length
        return
    fail(
        job_config,
        "parallelism.context_parallel_degree",
        f"{job_config.model.name} attends to {tokens} tokens where a rank has a part of "
        f"{' or '.join(map(str, parts))}. "
        "What it adds to them, such as a prefix, and patches or blocks into which it divides them "
        "would be those of each rank's part. Set it to 1; or if each rank has them all, as of an "
        "image, attend by the function torchtitan.models.common.attention.sdpa, which stays as is",
        ContextParallelError,
    )


def _all_gather(attention: ScaledDotProductAttention, shards: SequenceShards) -> Attend:
    """Gather the keys and values of all ranks (Llama 3, arXiv:2407.21783, section 3.3.2)."""
    attend = attention.forward

    def forward(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: AttentionMask = None
    ) -> torch.Tensor:
        k, v = shards.gather(k, 2), shards.gather(v, 2)  # [batch, kv_heads, seq, head_dim]
        if mask is not None or not attention.causal:
            return attend(q, k, v, mask)
        # Plain causal: each chunk of queries sees the keys up to its own end.
        length = q.shape[2] // 2
        ends = [(number + 1) * length for number in shards.chunks]
        parts = zip(q.split(length, dim=2), ends, strict=True)
        return torch.cat([attend(part, k[:, :, :end], v[:, :, :end]) for part, end in parts], dim=2)

    return forward


def _ulysses(attention: ScaledDotProductAttention, shards: SequenceShards) -> Attend:
    """Exchange a part of the sequence for a part of the heads (arXiv:2309.14509)."""
    attend = attention.forward

    def forward(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: AttentionMask = None
    ) -> torch.Tensor:
        # A rank needs its query heads' key and value heads: repeat them if they are too few.
        repeats = shards.size // math.gcd(k.shape[1], shards.size)
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        q, k, v = (shards.exchange(x, split_dim=1, join_dim=2) for x in (q, k, v))
        out = attend(q, k, v, mask)  # [batch, heads / cp, seq, head_dim]
        return shards.exchange(out, split_dim=2, join_dim=1)

    return forward


def _ring(attention: ScaledDotProductAttention, shards: SequenceShards) -> Attend:
    """Pass keys and values around, using a kernel with mergeable results."""
    from torchtitan.models.common.attention import fits_flash_kernel

    group_name = shards.mesh.get_group().group_name  # here, as the compiler cannot trace it

    def forward(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: AttentionMask = None
    ) -> torch.Tensor:
        if mask is not None:
            raise ContextParallelError(
                "parallelism.context_parallel_method = 'ring': ring attention supports only plain "
                "causal attention, but a layer has a mask of its own. Use 'allgather' or 'ulysses'"
            )
        if q.device.type == "cuda" and not fits_flash_kernel(q, v):
            raise ContextParallelError(
                "parallelism.context_parallel_method = 'ring': CUDA's flash kernel takes heads of "
                f"8, 16, ..., 256 features in bfloat16, but a layer's are of {q.shape[-1]} in "
                f"{q.dtype}. Use 'allgather' or 'ulysses'"
            )
        return ring_attention(q, k, v, shards, group_name)

    return forward


_METHODS: dict[str, Callable[[ScaledDotProductAttention, SequenceShards], Attend]] = {
    "allgather": _all_gather,
    "ulysses": _ulysses,
    "ring": _ring,
}
