"""A bundle -> its manifest's figures, and whether it is what its build made.

`figures` measures what was sampled; `finish_build` writes it down with the hash of every file;
`check_bundle` hashes the files, recomputes every stored measure, and samples some texts again from
the weights. Sampling belongs in `build`. Invariant: figures depend on the files alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from taprobe_core.demo.bundle import (
    MANIFEST,
    TRUTH,
    Record,
    read_manifest,
    read_records,
    verify_files,
)
from taprobe_core.demo.task import SETTINGS, Continuation, seeded
from taprobe_core.demo.truth import exact_importance, measures
from taprobe_core.errors import CorruptArtifactError, TaprobeError
from taprobe_core.labels import trigram_masked_dissimilar
from taprobe_core.store.integrity import file_sha256
from tools.demo.build import (
    GATES,
    RECIPE,
    STEPS,
    Recipe,
    recipe_of,
)
from tools.demo.sampling import Reasoner, Resampler, base_traces

if TYPE_CHECKING:
    import torch

_CF = "counterfactual_importance_accuracy"

MIN_DISSIMILAR = 0.05
"""Share of dissimilar rests from which an importance is more than that of a few sentences."""

N_AGAIN = 3
"""Places per reasoner that are sampled again, and..."""

N_ROWS_AGAIN = 10
"""...rests at each."""


def finish_build(folder: Path) -> dict[str, Any]:
    """Write the manifest of a build whose steps are all there.

    Args:
        folder: what `build_demo` made.

    Returns:
        The manifest: recipe, steps (seconds, device, versions), gates, figures, sha256 by file.
    """
    recipe = json.loads((folder / RECIPE).read_text(encoding="utf-8"))
    steps = (folder / STEPS).read_text(encoding="utf-8").splitlines()
    manifest: dict[str, Any] = {
        "recipe": recipe,
        "steps": [json.loads(line) for line in steps],
        "gates": {
            name: json.loads((folder / name / GATES).read_text(encoding="utf-8"))
            for name in recipe["reasoners"]
        },
        "figures": {name: figures(folder, name) for name in recipe["reasoners"]},
        "sha256": {
            path.relative_to(folder).as_posix(): file_sha256(path)
            for name in recipe["reasoners"]
            for path in sorted((folder / name).iterdir())
        },
    }
    text = json.dumps(manifest, indent=1, sort_keys=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    for name in (RECIPE, STEPS):
        (folder / name).unlink()
    return manifest


def figures(folder: Path, reasoner: str) -> dict[str, dict[str, float]]:
    """Measure what one reasoner said, per setting.

    Args:
        folder: a bundle, its manifest not needed.
        reasoner: one of its reasoners.

    Returns:
        Per setting: n_sentences; share_large, of sentences whose true |importance| exceeds .1;
        reliability, the split-half correlation of the importance corrected to all rollouts
        (Spearman-Brown, 2r/(1+r)), and reliability_25, that of a quarter of them; correlation of
        the importance with the policy's exact one; correlation and largest distance of the
        importance at many rollouts from the exact one, on the traces that have it, over n_truth
        sentences whose rests are dissimilar in `MIN_DISSIMILAR` or more (below, the importance is
        that of a few malformed sentences, which the policy never says).
    """
    records = list(read_records(folder, reasoner))
    by_setting = {name: [r for r in records if r.setting == name] for name in SETTINGS}
    return {
        setting: {**_label_figures(own), **_truth_figures(folder, reasoner, setting, own)}
        for setting, own in by_setting.items()
    }


def _label_figures(records: list[Record]) -> dict[str, float]:
    labels = np.concatenate([[row[_CF] for row in record.measures[:-1]] for record in records])
    exact = np.concatenate([exact_importance(record.reasoned)[:-1] for record in records])
    half = split_half(records, 2)
    quarter = split_half(records, 4)
    return {
        "n_sentences": len(labels),
        "share_large": float(np.mean(np.abs(exact) > 0.1)),
        "reliability": 2 * half / (1 + half),
        "reliability_25": quarter,
        "correlation_with_exact": _correlation(labels, exact),
    }


def _truth_figures(
    folder: Path, reasoner: str, setting: str, records: list[Record]
) -> dict[str, float]:
    stored = json.loads((folder / reasoner / TRUTH).read_text(encoding="utf-8"))
    exact = {
        record.reasoned.problem.id: exact_importance(record.reasoned)[:-1] for record in records
    }
    rows = [row for row in stored if row["setting"] == setting]
    measured = [m for row in rows for m in row["measures"][:-1]]
    is_sure = np.array([m["different_trajectories_fraction"] >= MIN_DISSIMILAR for m in measured])
    many = np.array([m[_CF] for m in measured])[is_sure]
    true = np.concatenate([exact[row["problem_id"]] for row in rows])[is_sure]
    return {
        "n_truth": len(many),
        "truth_correlation_with_exact": _correlation(many, true),
        "truth_largest_distance": float(np.abs(many - true).max(initial=0.0)),
    }


def split_half(records: list[Record], n_parts: int, n_splits: int = 20) -> float:
    """Correlate the importances of two disjoint parts of the rollouts.

    Args:
        records: of one setting.
        n_parts: each part has one in `n_parts` of a sentence's rollouts.
        n_splits: random splits, whose correlations are averaged.
    """
    rng = np.random.default_rng(0)
    outcomes = [[_outcomes(record, i) for i in range(len(record.measures))] for record in records]
    found = []
    for _ in range(n_splits):
        parts: tuple[list[float], list[float]] = ([], [])
        for banks in outcomes:
            orders = [rng.permutation(len(bank)) for bank in banks]
            for part, values in enumerate(parts):
                chosen = [
                    bank[order[part * (len(bank) // n_parts) :][: len(bank) // n_parts]]
                    for bank, order in zip(banks, orders, strict=True)
                ]
                values += _importances(chosen)
        found.append(_correlation(*map(np.array, parts)))
    return float(np.mean(found))


def _outcomes(record: Record, index: int) -> npt.NDArray[np.bool_]:
    """Return [rollout, (dissimilar, right)] of the answered rollouts at one sentence."""
    removed = record.reasoned.texts[index]
    bank: list[Continuation] = [r for r in record.reasoned.rollouts[index] if r.answer]
    rows = [
        (trigram_masked_dissimilar(removed, rest.first_sentence), rest.is_correct) for rest in bank
    ]
    return np.array(rows, dtype=np.bool_).reshape(-1, 2)


def _importances(banks: list[npt.NDArray[np.bool_]]) -> list[float]:
    values = []
    for bank, following in pairwise(banks):
        dissimilar = bank[bank[:, 0], 1]
        has_both = len(dissimilar) and len(following)
        values.append(float(dissimilar.mean() - following[:, 1].mean()) if has_both else 0.0)
    return values


def _correlation(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    """Return Pearson's correlation; 0 where a side does not vary, as among very few rollouts."""
    varies = all(len(np.unique(side)) > 1 for side in (a, b))
    return float(np.corrcoef(a, b)[0, 1]) if varies else 0.0


def check_bundle(folder: Path, device: torch.device) -> Iterator[str]:
    """Check a bundle, and say what was found sound, line by line.

    Args:
        folder: a bundle.
        device: where to sample again.

    Yields:
        One line per check that passed.

    Raises:
        CorruptArtifactError: a file's bytes, a measure or a text is not what the build made.
        DataError: the bundle cannot be read.
    """
    verify_files(folder)
    manifest = read_manifest(folder)
    yield f"{len(manifest['sha256'])} files have the manifest's sha256"
    recipe = recipe_of(manifest["recipe"])
    for name in recipe.reasoners:
        records = list(read_records(folder, name))
        for record in records:
            if measures(record.reasoned) != record.measures:
                raise _differs(folder, name, record, "measures recomputed from its rollouts")
        yield f"{name}: measures of {len(records)} traces recomputed, all equal"
        n_texts = _sample_again(folder, name, recipe, records, device)
        yield f"{name}: {n_texts} texts sampled again from the weights, all equal"


def _sample_again(
    folder: Path, name: str, recipe: Recipe, records: list[Record], device: torch.device
) -> int:
    reasoner = Reasoner(folder / name, device)
    rng = seeded(recipe.seed, name, "again")
    chosen = rng.sample(records, min(N_AGAIN, len(records)))
    n_texts = 0
    for record in chosen:
        problem, trace = record.reasoned.problem, record.reasoned.trace
        bases = base_traces(reasoner, recipe.seed, name, [problem], recipe.n_candidates)
        if bases[record.setting] != [trace]:
            raise _differs(folder, name, record, "base trace")
        index = rng.randrange(len(trace.sentences))
        resampler = Resampler(reasoner, recipe.seed, name, record.setting)
        for purpose, banks in (
            ("rollouts", record.reasoned.rollouts),
            ("forced", record.reasoned.forced),
        ):
            stored = [rest.text for rest in banks[index]][:N_ROWS_AGAIN]
            (again,) = resampler.rests([(problem, trace, index)], len(stored), purpose)
            if again != stored:
                raise _differs(folder, name, record, f"{purpose} at sentence {index}")
            n_texts += len(stored)
    return n_texts + len(chosen)


def _differs(folder: Path, name: str, record: Record, what: str) -> TaprobeError:
    return CorruptArtifactError(
        f"{what}: not what is stored",
        f"{folder / name}, {record.setting}, problem {record.reasoned.problem.id}",
        "build the demo again, or restore its files from version control",
    )
