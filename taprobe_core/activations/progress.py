"""How far an extraction is: tokens done, rate, time left.

A snapshot, made from counts and a clock reading; it reads no clock and prints nothing. Tokens are
the measure of work, since texts differ in length tenfold.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """One moment of an extraction.

    Attributes:
        n_texts_done: texts finished.
        n_texts: texts in all.
        n_tokens_done: tokens of the finished texts.
        n_tokens: tokens of all texts.
        elapsed_s: seconds since the start, the consumer's own work between texts included.
    """

    n_texts_done: int
    n_texts: int
    n_tokens_done: int
    n_tokens: int
    elapsed_s: float

    @property
    def tokens_per_s(self) -> float | None:
        """Mean rate since the start; None before anything is measured."""
        if self.elapsed_s <= 0 or not self.n_tokens_done:
            return None
        return self.n_tokens_done / self.elapsed_s

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
        """
        share = 100 * self.n_tokens_done // self.n_tokens if self.n_tokens else 100
        head = (
            f"{self.n_texts_done}/{self.n_texts} texts, "
            f"{self.n_tokens_done:,}/{self.n_tokens:,} tokens ({share} %)"
        )
        rate, eta = self.tokens_per_s, self.eta_s
        if rate is None or eta is None:
            return head
        return f"{head}, {rate:,.0f} tokens/s, {_duration(eta)} left"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
