"""Results from a device to the host while the device goes on working.

On CUDA each copy goes into pinned memory, on a stream of its own that waits for the result; on
other devices a copy is immediate. What does not belong here: what is copied.

The invariant: after `wait` every tensor handed out is whole; the source lives until then.
"""

from __future__ import annotations

import torch


class Transfer:
    """Copies that one pack asks for."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a CPU tensor that holds the values of `tensor` once `wait` has returned.

        Args:
            tensor: on any device, complete in the order of its device's current stream.
        """
        # Made outside inference mode, so that whoever gets it may change it in place.
        with torch.inference_mode(False):
            if not tensor.is_cuda:
                return tensor.to("cpu", copy=True)
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        stream = self._streams.get(tensor.device)
        if stream is None:
            stream = self._streams[tensor.device] = torch.cuda.Stream(  # type: ignore[no-untyped-call]
                tensor.device
            )
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)
        return host

    def wait(self) -> None:
        """Wait until every copy has arrived."""
        for stream in self._streams.values():
            stream.synchronize()
