from __future__ import annotations

import polars as pl
import pytest

from taprobe_core.evaluation.selection import ANY_ACTIVATION_PROBE
from taprobe_core.report.findings import VERDICT_LABELS, findings, headline_rows, verdict_of

POSITION, TEXT = "position_baseline", "text_only_baseline"


def _selected(
    *rows: tuple[str, str, float | None, float | None, float | None],
    recipe=ANY_ACTIVATION_PROBE,
    p=0.012,
) -> pl.DataFrame:
    return pl.DataFrame(
        [
            {
                "setting": "correct",
                "model": "tiny",
                "protocol": protocol,
                "recipe": recipe,
                "metric": "pr_auc",
                "value": 0.4,
                "chance": 0.13,
                "oracle": None,
                "true_value": None,
                "n_candidates": 12,
                "baseline": baseline,
                "n_problems": 12 if protocol == "lopo" else 3,
                "delta": delta,
                "delta_low": low,
                "delta_high": high,
                "is_planned": True,
                "correction": "holm",
                "n_contrasts": 8,
                "p_adjusted": None if delta is None else p,
                "interval_note": None if low is not None else "3 problems have only 10 resamples",
            }
            for protocol, baseline, delta, low, high in rows
        ],
        schema_overrides={
            "p_adjusted": pl.Float64,
            "delta": pl.Float64,
            "delta_low": pl.Float64,
            "delta_high": pl.Float64,
        },
    )


BEATS, WORSE, NEITHER = (0.1, 0.02, 0.2), (-0.1, -0.2, -0.01), (0.05, 0.0, 0.1)
NO_INTERVAL = (0.3, None, None)


@pytest.mark.parametrize(
    ("against_position", "against_text", "verdict"),
    [
        (BEATS, BEATS, "beats"),
        (BEATS, NEITHER, "mixed"),
        (BEATS, WORSE, "mixed"),
        (WORSE, NEITHER, "worse"),
        (NEITHER, NEITHER, "no evidence"),
        (NEITHER, NO_INTERVAL, "no evidence"),
        (NO_INTERVAL, NO_INTERVAL, "cannot say"),
    ],
)
def test_verdict_of_both_baselines(against_position, against_text, verdict):
    selected = _selected(("lopo", POSITION, *against_position), ("lopo", TEXT, *against_text))
    (finding,) = findings(selected)
    assert finding.verdict == verdict
    assert (finding.setting, finding.model) == ("correct", "tiny")
    assert verdict in VERDICT_LABELS


def test_a_bound_at_zero_beats_nothing():
    for low, high in ((0.0, 0.2), (-0.2, 0.0)):
        row = {"delta_low": low, "delta_high": high, "p_adjusted": 0.01}
        assert verdict_of(row) == "no evidence"


@pytest.mark.parametrize(
    ("p", "verdict"), [(0.05, "beats"), (0.051, "no evidence"), (None, "no evidence")]
)
def test_what_does_not_survive_the_correction_beats_nothing(p, verdict):
    assert verdict_of({"delta_low": 0.1, "delta_high": 0.2, "p_adjusted": p}) == verdict
    below = {"beats": "worse"}.get(verdict, verdict)
    assert verdict_of({"delta_low": -0.2, "delta_high": -0.1, "p_adjusted": p}) == below


def test_the_correction_is_said_in_words():
    selected = _selected(("lopo", POSITION, *BEATS), ("lopo", TEXT, *BEATS), p=0.0004)
    text = findings(selected)[0].text
    assert "interval +0.020 to +0.200, p < 0.001)" in text
    assert "p is corrected for 8 planned comparisons (Holm)." in text
    alone = selected.with_columns(n_contrasts=pl.lit(1), is_planned=pl.lit(value=False))
    assert "p is corrected for 1 comparison (Holm)." in findings(alone)[0].text
    assert "corrected" not in findings(selected.with_columns(correction=pl.lit("none")))[0].text


def test_words_carry_the_numbers_and_the_reason():
    selected = _selected(("lopo", POSITION, *BEATS), ("lopo", TEXT, *NO_INTERVAL))
    text = findings(selected)[0].text
    assert "out of 12 candidates reaches PR-AUC 0.400 (chance 0.130) under lopo" in text
    assert "beats position_baseline (+0.100, 95 % interval +0.020 to +0.200, p 0.012)" in text
    assert "cannot be judged against text_only_baseline (+0.300, no interval)" in text
    assert text.endswith("No interval: 3 problems have only 10 resamples.")


def test_the_protocol_with_most_problems_speaks():
    selected = _selected(("holdout", POSITION, *NO_INTERVAL), ("lopo", POSITION, *WORSE))
    (finding,) = findings(selected)
    assert finding.verdict == "worse"
    assert headline_rows(selected)["protocol"].to_list() == ["lopo"]


def test_only_the_joint_choice_is_a_headline():
    assert findings(_selected(("lopo", POSITION, *BEATS), recipe="linear_probe")) == []


def test_undefined_values_are_written_as_such():
    selected = _selected(("lopo", POSITION, None, None, None)).with_columns(
        value=pl.lit(None, pl.Float64), chance=pl.lit(None, pl.Float64)
    )
    text = findings(selected)[0].text
    assert "reaches PR-AUC undefined under" in text
    assert "(undefined)" in text


def test_a_known_truth_is_told():
    selected = _selected(("lopo", POSITION, *BEATS), ("lopo", TEXT, *BEATS))
    known = selected.with_columns(oracle=pl.lit(0.9), true_value=pl.lit(0.62))
    text = findings(known)[0].text
    assert "(chance 0.130, oracle 0.900)" in text
    assert "Against the true anchors the same scores reach 0.620." in text
