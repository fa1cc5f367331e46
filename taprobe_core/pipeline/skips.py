"""Problems left out of a study, with the reason of each: those that were, and those that will be.

Rollouts leave out what cannot be read, labels what lacks its measure, spans what cannot be placed
or is too long for the model. All of it is decided before a model runs. Deciding it belongs in
`rollouts`, `labels` and `spans`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import polars as pl

from taprobe_core.errors import DataError, PlanError, TaprobeError
from taprobe_core.pipeline.plan import Plan
from taprobe_core.rollouts import FolderRollouts, read_rollouts
from taprobe_core.splits import Fold, make_folds
from taprobe_core.tables import SKIPPED, schema_of


class Foreseen(NamedTuple):
    """What a run will leave out.

    Attributes:
        skipped: `tables.SKIPPED` with model and setting.
        notes: what cannot be told yet, and why.
    """

    skipped: pl.DataFrame
    notes: list[str]


def stored_skips(plan: Plan) -> pl.DataFrame:
    """Return the problems that the store's artifacts of this plan leave out.

    Returns:
        `tables.SKIPPED` with model and setting, in the order of the stages; a cell whose artifact
        is not there has none.
    """
    parts = [_empty()]
    for stage in plan.stages.that_skip():
        for cell in plan.stages.cells(plan.study, stage):
            try:
                found = _stored(plan, stage, *cell)
            except TaprobeError:  # it cannot be told here which artifact that would be
                continue
            if found is not None:
                parts.append(found)
    return pl.concat(parts)


def foreseen_skips(plan: Plan) -> Foreseen:
    """Return the problems that a run will leave out, or stop at, before anything is computed.

    Read from the store where a stage has run. Otherwise the dataset's files are read and tokenized
    here, without a model; those of a hub repository are not fetched for it.
    """
    parts, notes = [_empty()], []
    for model in plan.study.models:
        for setting in plan.study.settings:
            try:
                # What is found before an error stays.
                parts.extend(_foreseen(plan, model, setting))
            except TaprobeError as error:
                notes.append(f"problems of {model}, {setting}: {error.what}")
    return Foreseen(pl.concat(parts), notes)


def folds_of(plan: Plan, model: str, setting: str, present: tuple[int, ...]) -> list[Fold]:
    """Return the study's folds for the problems that a model and setting has.

    Raises:
        PlanError: too few problems are left; says why the others were left out.
    """
    try:
        return make_folds(plan.problem_ids(), plan.study.splits, present=present)
    except PlanError as error:
        skipped = stored_skips(plan).filter(model=model, setting=setting)
        if skipped.is_empty():
            raise
        reasons = [f"problem {row['problem_id']}: {row['what']}" for row in skipped.to_dicts()]
        more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
        raise PlanError(
            f"{error.what}; left out of {model}, {setting}: {'; '.join(reasons[:3])}{more}",
            error.where,
            error.fix,
        ) from None


def _foreseen(plan: Plan, model: str, setting: str) -> Iterator[pl.DataFrame]:
    """Yield what each stage leaves out; one that cannot be told does not hide those before it."""
    from taprobe_core.checkpoints import load_tokenizer
    from taprobe_core.labels.make import unlabelled
    from taprobe_core.spans import make_spans

    study = plan.study
    found = _stored(plan, "rollouts", model, setting)
    if found is not None:
        artifact = plan.open("rollouts", (model, setting))
        problems, sentences = (
            artifact.read_table(f"{name}.parquet") for name in ("problems", "sentences")
        )
    elif isinstance(plan.source, FolderRollouts):
        chosen = study.rollouts.model_copy(update={"on_bad_problem": "skip"})
        tables = read_rollouts(plan.source, plan.model(model), chosen, setting, study.labels.field)
        problems, sentences = tables.problems, tables.sentences
        found = _placed(tables.skipped, model, setting)
    else:
        raise DataError(
            "not read yet, so it is not known which can be used; "
            "`taprobe run --select rollouts --select labels --select spans` finds out",
            "rollouts.source",
            "run these stages, then check again",
        )
    yield found
    found = _stored(plan, "labels", model, setting)
    yield _placed(unlabelled(sentences, study.labels), model, setting) if found is None else found
    found = _stored(plan, "spans", model, setting)
    if found is None:
        tokenizer, _ = load_tokenizer(plan.model(model))
        view, limit = study.spans.text_view, plan.context_length(model)
        spans = make_spans(problems, sentences, tokenizer, view, "skip", limit)
        found = _placed(spans.skipped, model, setting)
    yield found


def _stored(plan: Plan, stage: str, model: str, setting: str) -> pl.DataFrame | None:
    artifact = plan.store.find(plan.key(stage, (model, setting)))
    if artifact is None:
        return None
    return _placed(artifact.read_table("skipped.parquet"), model, setting)


def _placed(skipped: pl.DataFrame, model: str, setting: str) -> pl.DataFrame:
    return skipped.with_columns(model=pl.lit(model), setting=pl.lit(setting))


def _empty() -> pl.DataFrame:
    return _placed(schema_of(SKIPPED).to_frame(), "", "")
