from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


def _sensitive_layers() -> list[str]:
    return ["output", "router.gate"]


@dataclass
class Float8Linear:
    """Linear layers that multiply in float8 (`quantize.linear.float8`)."""

    recipe_name: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] = "tensorwise"
    """Scales per tensor (fastest; gradients in e5m2) or per row (more exact; all in e4m3);
    `_with_gw_hp` computes the weight gradients in high precision."""
    filter_fqns: list[str] = field(default_factory=_sensitive_layers)
    """Layers whose names contain one of these are not converted. An entry that no name contains is
    an error, except the two defaults."""
    emulate: bool = False
    """Round to float8, but multiply in high precision: slow, with the same numbers on any device.
    A CPU always does this."""
    enable_fsdp_float8_all_gather: bool = False
    """FSDP rounds weights to float8 before it gathers them, with the same numbers as a result: half
    of the bytes of bfloat16 travel, and are held. Needs `tensorwise`; not with
    `training.enable_cpu_offload`."""


@dataclass
class MXLinear:
    """Linear layers that multiply in MXFP8 (`quantize.linear.mx`): e4m3 with one scale per 32
    elements (OCP Microscaling Formats v1.0)."""

    filter_fqns: list[str] = field(default_factory=_sensitive_layers)
    """As in `quantize.linear.float8`."""
    emulate: bool = False
    """As in `quantize.linear.float8`."""


@dataclass
class QuantizeLinear:
    """Linear layers that compute in 8 bits."""

    float8: Float8Linear = field(default_factory=Float8Linear)
    """See `[quantize.linear.float8]`."""
    mx: MXLinear = field(default_factory=MXLinear)
    """See `[quantize.linear.mx]`."""


@dataclass
class Float8GroupedMM:
    """Experts with grouped matrix products in float8, one scale per row; weight gradients stay in
    high precision (`quantize.grouped_mm.float8`)."""

    emulate: bool = False
    """As in `quantize.linear.float8`."""


@dataclass
class MXGroupedMM:
    """Experts with grouped matrix products in MXFP8, so far only emulated
    (`quantize.grouped_mm.mx`)."""

    emulate: bool = False
    """As in `quantize.linear.float8`."""


@dataclass
class QuantizeGroupedMM:
    """Experts that compute in 8 bits."""

    float8: Float8GroupedMM = field(default_factory=Float8GroupedMM)
    """See `[quantize.grouped_mm.float8]`."""
    mx: MXGroupedMM = field(default_factory=MXGroupedMM)
    """See `[quantize.grouped_mm.mx]`."""


@dataclass
class Quantize:
    """Options of the converters listed in `model.converters`: matrix products in 8 bits."""

    linear: QuantizeLinear = field(default_factory=QuantizeLinear)
    """See `[quantize.linear]`."""
    grouped_mm: QuantizeGroupedMM = field(default_factory=QuantizeGroupedMM)
    """See `[quantize.grouped_mm]`."""
