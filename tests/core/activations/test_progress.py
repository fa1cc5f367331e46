"""What an extraction says of its speed, beside its tokens."""

from __future__ import annotations

import pytest

from taprobe_core.activations.schedule import Progress

HEAD = "1/3 texts, 300/900 tokens (33 %)"


@pytest.mark.parametrize(
    ("flop_done", "gemm_rate", "elapsed_s", "said"),
    [
        (0, None, 2.0, "150 tokens/s, 4 s left"),
        (0, 1e9, 2.0, "150 tokens/s, 4 s left"),
        (942 * 10**12, None, 2.0, "150 tokens/s, 471 TFLOP/s, 4 s left"),
        (
            942 * 10**12,
            673e12,
            2.0,
            "150 tokens/s, 471 TFLOP/s (70 % of the GEMM rate), 4 s left",
        ),
        (
            126_000_000_000,
            77.6e9,
            2.0,
            "150 tokens/s, 63 GFLOP/s (81 % of the GEMM rate), 4 s left",
        ),
    ],
)
def test_speed_is_said_where_it_is_known(
    flop_done: int, gemm_rate: float | None, elapsed_s: float, said: str
) -> None:
    progress = Progress(1, 3, 300, 900, elapsed_s, flop_done, gemm_rate)
    assert progress.render() == f"{HEAD}, {said}"


def test_before_anything_is_measured_nothing_is_known() -> None:
    progress = Progress(1, 3, 300, 900, 0.0, 10**12, 1e12)
    assert (progress.flop_per_s, progress.share_of_gemm_rate) == (None, None)
    assert progress.render() == HEAD


def test_the_share_is_of_the_devices_together() -> None:
    progress = Progress(2, 2, 10, 10, 4.0, 8 * 10**12, 4e12)
    assert progress.flop_per_s == 2e12
    assert progress.share_of_gemm_rate == 0.5
