"""Spans of one model and setting: what the model reads, and which tokens each sentence has."""

from __future__ import annotations

from typing import Any

from taprobe_core.pipeline.commit import (
    Files,
    commit_cell,
    contract_faults,
    dataset_provenance,
    warn_of_skipped,
)
from taprobe_core.pipeline.grid import Cell
from taprobe_core.pipeline.plan import Plan
from taprobe_core.pipeline.sources import NO_BOS
from taprobe_core.pipeline.stage import (
    Check,
    Description,
    Found,
    Outcome,
    Stage,
    cell_by_cell,
    median,
    present,
)


def _config(plan: Plan, cell: Cell) -> dict[str, Any]:
    model = cell[0]
    tokenizer_sha256 = plan.checkpoint(model)["tokenizer_sha256"]
    n_positions = plan.context_length(model)  # decides which texts are too long
    return {
        **plan.study.spans.model_dump(mode="json"),
        "tokenizer_sha256": tokenizer_sha256,
        "special_tokens": plan.special_tokens(model),
        "on_bad_problem": plan.study.rollouts.on_bad_problem,
        **({} if n_positions is None else {"n_positions": n_positions}),
    }


def _make(plan: Plan, cell: Cell) -> Outcome:
    """Place every sentence among the tokens of its text, commit.

    Raises:
        MissingArtifactError: the rollouts are not there yet.
        SpanError: a sentence cannot be placed, or a text is too long for the model, when the study
            says to fail on a bad problem.
        NotEnoughDataError: no problem is left.
        ModelError: the tokenizer cannot be used.
    """
    model = cell[0]

    def compute() -> Files:
        from taprobe_core.checkpoints import load_tokenizer
        from taprobe_core.spans import make_spans

        rollouts = plan.open("rollouts", cell)
        tokenizer, _ = load_tokenizer(plan.model(model))
        plan.check_model(model)
        tables = make_spans(
            rollouts.read_table("problems.parquet"),
            rollouts.read_table("sentences.parquet"),
            tokenizer,
            text_view=plan.study.spans.text_view,
            on_bad_problem=plan.study.rollouts.on_bad_problem,
            max_tokens=plan.context_length(model),
        )
        skipped = warn_of_skipped(tables.skipped, cell)
        return {"texts": tables.texts, "spans": tables.spans, "skipped": skipped}

    provenance = {
        **dataset_provenance(plan, *cell),
        "text_view": plan.study.spans.text_view,
        "tokenizer_sha256": plan.checkpoint(model)["tokenizer_sha256"],
        "bos": plan.bos_token(model) or NO_BOS,
    }
    return commit_cell(plan, "spans", cell, compute, provenance)


def _describe(plan: Plan, cell: Cell) -> Description:
    from taprobe_core.report import plots

    spans, texts = plan.read("spans", cell, "spans"), plan.read("spans", cell, "texts")
    metrics = {
        "n_problems": texts.height,
        "n_spans": spans.height,
        "n_tokens": int(texts["n_tokens"].sum()),
        "median_span_tokens": median(spans["n_tokens"]),
        "n_skipped": plan.read("spans", cell, "skipped").height,
    }
    picture = plots.span_lengths(spans["n_tokens"].to_numpy(), title=" · ".join(cell))
    return Description(present(metrics), spans.height, plots.to_data_uri(picture))


def spans_cover(plan: Plan, cell: Cell) -> Found:
    """Every sentence has its span, and the spans' text is the sentence, blanks apart."""
    from taprobe_core.spans import cover_faults

    texts, spans = plan.read("spans", cell, "texts"), plan.read("spans", cell, "spans")
    sentences = plan.read("rollouts", cell, "sentences")
    return Found(
        (
            *contract_faults(plan, "spans", cell, "texts", "spans"),
            *cover_faults(texts, spans, sentences),
        )
    )


SPANS = Stage(
    name="spans",
    title="The token range of every sentence; the ranges cover the thinking text exactly.",
    grid=("model", "setting"),
    reads=("rollouts",),
    code_version="1",
    config=_config,
    make=cell_by_cell(_make),
    describe=_describe,
    tables={"texts": "TEXTS", "spans": "SPANS", "skipped": "SKIPPED"},
    checks={
        "spans_cover": Check(spans_cover, reads=lambda plan, cell: [plan.key("rollouts", cell)])
    },
    op="read_rollouts",
    is_provenance=True,
)
