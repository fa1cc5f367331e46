"""How far an extraction is: tokens done, rate, share of what the device can do, time left.

A snapshot, made from counts and a clock reading; it reads no clock and prints nothing. Tokens are
the measure of what is left, since texts differ in length tenfold.
"""

from __future__ import annotations

from dataclasses import dataclass

from taprobe_core.activations.quantities import duration_text, flop_text


@dataclass(frozen=True)
class Progress:
    """One moment of an extraction.

    Attributes:
        n_texts_done: texts finished.
        n_texts: texts in all.
        n_tokens_done: tokens of the finished texts.
        n_tokens: tokens of all texts.
        elapsed_s: seconds since the start, the consumer's own work between texts included.
        flop_done: floating-point operations of the finished texts, by `cost.pass_flop`; 0 where
            they are not counted.
        gemm_rate: measured FLOP/s of all devices at work together in matrix products alone
            (`cost.sustained_gemm_rate`); None where it was not measured.
    """

    n_texts_done: int
    n_texts: int
    n_tokens_done: int
    n_tokens: int
    elapsed_s: float
    flop_done: int = 0
    gemm_rate: float | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """Mean rate since the start; None before anything is measured."""
        return self._rate(self.n_tokens_done)

    @property
    def flop_per_s(self) -> float | None:
        """Mean FLOP/s since the start; None before anything is measured."""
        return self._rate(self.flop_done)

    @property
    def share_of_gemm_rate(self) -> float | None:
        """`flop_per_s` as a share of `gemm_rate`; None unless both are known."""
        rate = self.flop_per_s
        return rate / self.gemm_rate if rate is not None and self.gemm_rate else None

    @property
    def eta_s(self) -> float | None:
        """Seconds left at the mean rate; None before anything is measured."""
        left = self.n_tokens - self.n_tokens_done
        if not left:
            return 0.0
        rate = self.tokens_per_s
        return None if rate is None else left / rate

    def render(self) -> str:
        """Return one line for a log.

        Example:
            >>> Progress(1, 4, 500, 2000, 10.0).render()
            '1/4 texts, 500/2,000 tokens (25 %), 50 tokens/s, 30 s left'
            >>> Progress(2, 2, 900, 900, 2.0, 942 * 10**12, 673e12).render()
            '2/2 texts, 900/900 tokens (100 %), 450 tokens/s, 471 TFLOP/s (70 % of the GEMM rate), \
0 s left'
        """
        share = 100 * self.n_tokens_done // self.n_tokens if self.n_tokens else 100
        parts = [
            f"{self.n_texts_done}/{self.n_texts} texts",
            f"{self.n_tokens_done:,}/{self.n_tokens:,} tokens ({share} %)",
        ]
        rate, eta = self.tokens_per_s, self.eta_s
        if rate is not None and eta is not None:
            parts.append(f"{rate:,.0f} tokens/s")
            if self.flop_per_s is not None:
                parts.append(self._speed(self.flop_per_s))
            parts.append(f"{duration_text(eta)} left")
        return ", ".join(parts)

    def _speed(self, flop_per_s: float) -> str:
        share = self.share_of_gemm_rate
        said = f"{flop_text(flop_per_s)}/s"
        return said if share is None else f"{said} ({100 * share:.0f} % of the GEMM rate)"

    def _rate(self, amount: int) -> float | None:
        return amount / self.elapsed_s if self.elapsed_s > 0 and amount else None
