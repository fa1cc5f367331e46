"""How fast this machine multiplies the matrices of a study's models: the yardstick of a forecast.

In: the study's device and the shapes of its models. Out: FLOP/s, measured with random values; no
weights are loaded. What does not belong here: what there is to multiply (forecast).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from taprobe_core.activations.block_shape import BlockShape
from taprobe_core.checkpoints import pick_devices
from taprobe_core.errors import ConfigError
from taprobe_core.pipeline.plan import Plan


@dataclass(frozen=True)
class Speed:
    """What the study's devices do.

    Attributes:
        device: their kind; what the study says, when this machine lacks it or nobody asked.
        n_devices: how many share the work.
        gemm_rates: by model, measured FLOP/s of one device; models that were not measured are not
            in it.
        note: why nothing can be measured here; None when it can.
    """

    device: str
    n_devices: int = 1
    gemm_rates: Mapping[str, float] = field(default_factory=dict)
    note: str | None = None


def measure_speed(
    plan: Plan, shapes: Mapping[str, BlockShape], *, is_measured: bool = True
) -> Speed:
    """Find the study's devices and measure one of them, once for each shape and number type.

    Args:
        plan: the plan.
        shapes: by model; models without one are left out.
        is_measured: False only looks whether the devices are there that the study names.
    """
    named = plan.study.activations.device
    if not is_measured and named in {"auto", "cpu"}:
        return Speed(named)  # every machine has one: torch, which takes seconds, need not be asked
    try:
        devices = pick_devices(named)
    except ConfigError as error:
        return Speed(named, note=error.what)
    if not is_measured:
        return Speed(devices[0].type, len(devices))
    import torch

    from taprobe_core.activations.gemm_rate import sustained_gemm_rate

    rates: dict[tuple[BlockShape, str], float] = {}
    by_model: dict[str, float] = {}
    for model, shape in shapes.items():
        dtype = plan.model(model).dtype
        if (shape, dtype) not in rates:
            rates[shape, dtype] = sustained_gemm_rate(devices[0], getattr(torch, dtype), shape)
        by_model[model] = rates[shape, dtype]
    return Speed(devices[0].type, len(devices), by_model)
