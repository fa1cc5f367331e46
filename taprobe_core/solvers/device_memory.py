"""How many bytes a solve may take on a device. What does not belong here: what it takes."""

from __future__ import annotations

import torch


def free_bytes(device: torch.device, on_cpu: int) -> int:
    """Return the bytes that a solve may take: half of what is free on CUDA.

    Args:
        device: where it computes.
        on_cpu: the answer for other devices.
    """
    if device.type != "cuda":
        return on_cpu
    free, _ = torch.cuda.mem_get_info(device)
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (free + idle) // 2
