from __future__ import annotations

import polars as pl
import pytest

from taprobe_core.findings import VERDICT_LABELS, findings, headline_rows, verdict_of
from taprobe_core.selection import ANY_ACTIVATION_PROBE

POSITION, TEXT = "position_baseline", "text_only_baseline"


def _selected(
    *rows: tuple[str, str, float | None, float | None, float | None], recipe=ANY_ACTIVATION_PROBE
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
                "interval_note": None if low is not None else "3 problems have only 10 resamples",
            }
            for protocol, baseline, delta, low, high in rows
        ],
        schema_overrides={"delta": pl.Float64, "delta_low": pl.Float64, "delta_high": pl.Float64},
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
    assert verdict_of({"delta_low": 0.0, "delta_high": 0.2}) == "no evidence"
    assert verdict_of({"delta_low": -0.2, "delta_high": 0.0}) == "no evidence"


def test_words_carry_the_numbers_and_the_reason():
    selected = _selected(("lopo", POSITION, *BEATS), ("lopo", TEXT, *NO_INTERVAL))
    text = findings(selected)[0].text
    assert "out of 12 candidates reaches PR-AUC 0.400 (chance 0.130) under lopo" in text
    assert "beats position_baseline (+0.100, 95 % interval +0.020 to +0.200)" in text
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
