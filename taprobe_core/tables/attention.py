"""Contracts of what follows from attention between sentences.

`proximity` is the least distance, in sentences, between a query and a key that count; `head` is
counted within the layer, from 0. A null is a value that the definition leaves open.
"""

from __future__ import annotations

import polars as pl

from taprobe_core.tables.contract import FINITE, SENTENCE_KEY, Contract, at_least, column, within
from taprobe_core.tables.results import PROTOCOLS, SPLITS

_HEAD = column(pl.Int64, at_least(0))
_SHARE = within(0, 1 + 1e-3)
"""A share is a ratio of float32 sums, which round."""

ATTENTION_SCORES = Contract(
    {
        **SENTENCE_KEY,
        "attention_score": column(pl.Float64, at_least(0), FINITE),
    },
    ordered=True,
    unique=["problem_id", "sentence_idx"],
    name="attention_scores",
)
"""One row per sentence: the simple score, one layer, all heads averaged (`attention.scores`)."""

VERTICAL_SCORES = Contract(
    {
        "problem_id": column(pl.Int64, at_least(0)),
        "head": _HEAD,
        "sentence_idx": column(pl.Int64, at_least(0)),
        "vertical_score": column(pl.Float64, at_least(0), FINITE, nullable=True),
    },
    ordered=True,
    unique=["problem_id", "head", "sentence_idx"],
    name="vertical_scores",
)
"""One row per head and sentence, at the study's first proximity and with its depth control; null
for the last sentences, which no other stands far enough behind."""

ATTENTION_HEADS = Contract(
    {
        "problem_id": column(pl.Int64, at_least(0)),
        "head": _HEAD,
        "bos_share": column(pl.Float64, _SHARE),
        "first_sentence_share": column(pl.Float64, _SHARE, nullable=True),
        "near_diagonal_share": column(pl.Float64, _SHARE, nullable=True),
        "distance_slope": column(pl.Float64, FINITE, nullable=True),
        "length_slope": column(pl.Float64, FINITE, nullable=True),
        "distance_intercept": column(pl.Float64, FINITE, nullable=True),
        "distance_r_squared": column(pl.Float64, nullable=True),
        "n_scores": column(pl.Int64, at_least(0)),
    },
    ordered=True,
    unique=["problem_id", "head"],
    name="attention_heads",
)
"""One row per problem and head: where its attention goes whatever the text means. The law of
distance is fitted to `n_scores` vertical scores without depth control, at the first proximity."""

HEAD_KURTOSIS = Contract(
    {
        "problem_id": column(pl.Int64, at_least(0)),
        "head": _HEAD,
        "proximity": column(pl.Int64, at_least(1)),
        "kurtosis": column(pl.Float64, FINITE, nullable=True),
        "spearman_with_first": column(pl.Float64, nullable=True),
    },
    ordered=True,
    unique=["problem_id", "head", "proximity"],
    name="head_kurtosis",
)
"""One row per problem, head and proximity: how heavy the tails of its vertical scores are, and how
they rank sentences beside those at the study's first proximity."""

_FOLD = {
    "protocol": column(pl.Enum(PROTOCOLS)),
    "fold": column(pl.Int32, at_least(0)),
}

RECEIVER_HEADS = Contract(
    {
        **_FOLD,
        "rank": column(pl.Int64, at_least(1)),
        "layer": column(pl.Int64, at_least(0)),
        "head": _HEAD,
        "kurtosis": column(pl.Float64, FINITE),
        "n_problems": column(pl.Int64, at_least(1)),
    },
    ordered=True,
    unique=["protocol", "fold", "rank"],
    name="receiver_heads",
)
"""One row per fold and chosen head, best first; `kurtosis` is its mean over the `n_problems` of the
fold's training problems in which it is defined."""

RECEIVER_SCORES = Contract(
    {
        **_FOLD,
        **SENTENCE_KEY,
        "split": column(pl.Enum(SPLITS)),
        "receiver_score": column(pl.Float64, at_least(0), FINITE, nullable=True),
    },
    ordered=True,
    unique=["protocol", "fold", "problem_id", "sentence_idx"],
    name="receiver_scores",
)
"""One row per fold and sentence of every problem, under the heads of the fold; `split` says on
which side of the fold the problem stands."""

RECEIVER_RELIABILITY = Contract(
    {
        "proximity": column(pl.Int64, at_least(1)),
        "n_problems": column(pl.Int64, at_least(1)),
        "n_heads": column(pl.Int64, at_least(0)),
        "n_undefined": column(pl.Int64, at_least(0)),
        "split_half_pearson": column(pl.Float64, nullable=True),
        "top_heads_kept": column(pl.Float64, within(0, 1), nullable=True),
        "median_spearman": column(pl.Float64, nullable=True),
    },
    ordered=True,
    unique=["proximity"],
    name="receiver_reliability",
)
"""One row per proximity, over all problems: it chooses nothing. `split_half_pearson` of the heads'
mean kurtosis in two halves of the problems, over `n_heads` heads; `top_heads_kept` is the share of
the heads that the first proximity ranks highest, null where they are all there are;
`median_spearman` is that of `spearman_with_first`."""
