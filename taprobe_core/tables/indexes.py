"""Contracts of indexes: which parts, each an artifact of its own, an artifact is made up of."""

from __future__ import annotations

import polars as pl

from taprobe_core.tables.contract import FINITE, Contract, at_least, column

ATTENTION_SHARDS = Contract(
    {
        "problem_id": column(pl.Int64, at_least(0)),
        "shard_fingerprint": column(pl.String),
    },
    ordered=True,
    unique=["problem_id"],
    name="attention_shards",
)
"""One row per problem: the artifact of its text that holds its vertical attention at one layer."""

ACTIVATION_SHARDS = Contract(
    {
        **ATTENTION_SHARDS.columns,
        "pooling": column(pl.String),
        "dtype": column(pl.String),
        "max_abs": column(pl.Float64, at_least(0), FINITE),
    },
    ordered=True,
    unique=["problem_id", "pooling"],
    name="activation_shards",
)
"""One row per problem and pooling: the artifact of its text that holds it at one layer, the number
type that it is stored in, and the largest magnitude before the cast."""

FITS = Contract(
    {
        "recipe": column(pl.String),
        "target": column(pl.String, nullable=True),
        "scope": column(pl.String),
        "fit": column(pl.String),
        "fit_fingerprint": column(pl.String),
    },
    ordered=True,
    unique=["recipe"],
    name="fits",
)
"""One row per recipe: where its fits stand. `scope` is a model for what reads none of its states,
else a site; `fit` is the recipe, with the seed where it is stochastic."""
