"""Tripwires as checks of stored data: is the pipeline of probes sound?

Those of fits look at the rows and folds that the probes of one site and setting are fitted on. The
pipeline is the same for all layers, so each model and setting is looked at once, at its middle
layer: a false alarm is rare (`tripwires`), and with every layer of a deep model it would not stay
so. Those of texts look at the rollouts, before anything is computed from them.
"""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import NDArray

from taprobe_core.errors import NotEnoughDataError, PlanError
from taprobe_core.features import ProbeData
from taprobe_core.keys import parse_site
from taprobe_core.pipeline.cells import Cell
from taprobe_core.pipeline.inputs import read_probe_data
from taprobe_core.pipeline.looking import Found
from taprobe_core.pipeline.plan import Plan
from taprobe_core.probes.threads import threads_for
from taprobe_core.splits import SIDES, Fold, make_folds
from taprobe_core.study import Pooling, ProbeRecipe
from taprobe_core.tripwires import (
    duplicates_across_problems,
    memorises_one_problem,
    network,
    ridge_probe,
    row_identity,
    shuffled_labels,
)


def shuffled_labels_at_chance(plan: Plan, cell: Cell) -> Found:
    """A probe of shuffled labels ranks held-out problems no better than chance."""
    data, X = _rows(plan, cell)
    folds = make_folds(plan.problem_ids(), plan.study.splits, present=data.problems)
    try:
        with threads_for(X.size):
            verdict = shuffled_labels(
                ridge_probe(X),
                data.problem_id,
                data.labels["is_anchor"].to_numpy(),
                folds,
                identity=row_identity(X),
                seed=plan.study.seeds[0],
            )
    except NotEnoughDataError as error:
        return Found(not_run=error.what)
    look = verdict.first
    return Found(
        () if verdict.passes else (verdict.text,),
        numbers={"p": look.p, "pr_auc": look.value, "chance": look.chance},
    )


def one_problem_is_memorised(plan: Plan, cell: Cell) -> Found:
    """A network learns the labels of the largest problem by heart, without early stopping."""
    data, X = _rows(plan, cell)
    try:
        with threads_for(X.size):
            verdict = memorises_one_problem(
                network(),
                X,
                data.problem_id,
                data.labels["is_anchor"].to_numpy(),
                seed=plan.study.seeds[0],
            )
    except NotEnoughDataError as error:
        return Found(not_run=error.what)
    return Found(
        () if verdict.passes else (verdict.text,),
        numbers={"pr_auc": verdict.value, "n_repeated_rows": verdict.n_repeated},
    )


def no_trace_on_two_sides(plan: Plan, cell: Cell) -> Found:
    """No two problems on different sides of a fold have the same trace, white space apart."""
    traces = (
        _sentences(plan, cell)
        .group_by("problem_id", maintain_order=True)
        .agg(pl.col("said").str.join(" ").alias("trace"))
    )
    copies = traces.group_by("trace", maintain_order=True).agg("problem_id")
    repeated = [same for same in copies["problem_id"].to_list() if len(same) > 1]
    try:
        folds = _folds(plan, traces["problem_id"].to_list())
    except PlanError as error:
        return Found(not_run=error.what)
    faults = [
        f"problems {', '.join(map(str, same))} have the same trace and stand on different sides of "
        f"{len(apart)} of {len(folds)} folds, first {apart[0]}"
        for same in repeated
        if (apart := [fold for fold in folds if _parts(fold, same)])
    ]
    return Found(tuple(faults), numbers={"n_copied_problems": sum(map(len, repeated))})


def passages_differ_across_problems(plan: Plan, cell: Cell) -> Found:
    """At most half of a held-out problem's passages stand word for word in a training problem."""
    # Passages of three sentences: of single ones, formulas, the bundled reasoners share half.
    sentences = _sentences(plan, cell)
    try:
        folds = _folds(plan, sentences["problem_id"].unique().to_list())
    except PlanError as error:
        return Found(not_run=error.what)
    before = [pl.col("said").shift(n).over("problem_id").fill_null("") for n in (2, 1)]
    passages = sentences.select("problem_id", passage=pl.concat_str(*before, "said", separator=" "))
    verdict = duplicates_across_problems(
        passages["passage"].rank("dense").cast(pl.Int64).to_numpy(),
        passages["problem_id"].to_numpy(),
        folds,
    )
    numbers = {"n_found": verdict.n_found, "n_passages": verdict.n_rows}
    if verdict.passes:
        return Found(numbers=numbers)
    worst = verdict.worst
    shared = passages.filter(problem_id=worst.source)["passage"]
    copied = passages.filter(pl.col("passage").is_in(shared.implode()), problem_id=worst.problem_id)
    examples = ", ".join(repr(each.strip()[:_SHOWN]) for each in copied["passage"][:_EXAMPLES])
    fault = (
        f"{verdict.n_found} of {verdict.n_rows} held-out passages of three sentences stand in a "
        f"training problem. Most are in problem {worst.problem_id}, {worst.protocol} fold "
        f"{worst.fold}: {worst.n_found} of {worst.n_rows}, and problem {worst.source} has the most "
        f"of them, such as {examples}"
    )
    return Found((fault,), numbers=numbers)


_SHOWN, _EXAMPLES = 80, 2
"""Characters of an example, and how many there are."""


def _sentences(plan: Plan, cell: Cell) -> pl.DataFrame:
    """problem_id, sentence_idx and `said`: the sentence with single spaces, in reading order."""
    table = plan.store.open(plan.rollouts(*cell)).read_table("sentences.parquet")
    said = pl.col("sentence").str.strip_chars().str.replace_all(r"\s+", " ").alias("said")
    return table.sort("problem_id", "sentence_idx").select("problem_id", "sentence_idx", said)


def _folds(plan: Plan, present: list[int]) -> list[Fold]:
    """The study's folds of the problems that are there; PlanError where they are too few."""
    return make_folds(plan.problem_ids(), plan.study.splits, present=present)


def _parts(fold: Fold, problems: list[int]) -> bool:
    """Whether a fold has some of the problems on one side, and others on another."""
    return sum(not set(problems).isdisjoint(getattr(fold, side)) for side in SIDES) > 1


def is_looked_at(plan: Plan, cell: Cell) -> bool:
    """Whether the tripwires of fits look at a cell: once per model and setting, at one layer."""
    site = parse_site(cell[0])
    sites = sorted(plan.sites(site.model), key=lambda site: site.layer)
    return pooling_read(plan) is not None and site == sites[len(sites) // 2]


def pooling_read(plan: Plan) -> Pooling | None:
    """The states that the first recipe of activations reads; None where no recipe reads any."""
    readers = [recipe for recipe in plan.study.recipes if "activations" in recipe.features]
    return readers[0].pooling if readers else None


def _rows(plan: Plan, cell: Cell) -> tuple[ProbeData, NDArray[np.float32]]:
    """The rows of a cell that is looked at, and the states that the first recipe of them reads."""
    site, pooling = parse_site(cell[0]), pooling_read(plan)
    if pooling is None:
        raise ValueError("no recipe reads activations")
    recipe = ProbeRecipe(name="tripwire", features=("activations",), pooling=pooling)
    data = read_probe_data(plan, site.model, cell[1], site, [recipe])
    return data, data.activations[recipe.pooling]
