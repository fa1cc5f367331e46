"""Linear probes are scikit-learn's converged optimum, on demo and real labels (`benchmarks`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.probes.agreement import compare, demo_rows, real_rows, variants
from benchmarks.probes.designs import anchor_columns, stand_in_states
from taprobe_core.probes.features import ProbeData
from taprobe_core.solvers.linear.fold_matrix import FoldMatrix
from taprobe_core.solvers.linear.logistic import solve_logistic
from taprobe_core.study import Labels

KINDS = ("iid", "ill", "demo")
Rows = tuple[str, ProbeData, Labels]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    return next(demo_rows(tmp_path_factory.mktemp("demo")))


@pytest.fixture(scope="module")
def real(
    tmp_path_factory: pytest.TempPathFactory, real_rollouts: Path, real_tokenizers: Path
) -> Rows:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAPROBE_ROLLOUTS", str(real_rollouts))
        patch.setenv("TAPROBE_TOKENIZERS", str(real_tokenizers))
        return next(real_rows(tmp_path_factory.mktemp("real")))


def check(data: ProbeData, labels: Labels, kind: str, states: np.ndarray) -> None:
    found = compare(variants(data, states, 600)[kind], labels)
    assert found.probability < 1e-3
    assert found.ridge < 1e-6
    assert found.n_equal == found.n_folds


@pytest.mark.parametrize("kind", KINDS)
def test_on_the_demos_labels(demo: Rows, kind: str) -> None:
    _, data, labels = demo
    check(data, labels, kind, data.activations["mean"])


@pytest.mark.real_data
@pytest.mark.parametrize("kind", KINDS)
def test_on_real_labels(real: Rows, demo: Rows, kind: str) -> None:
    _, data, labels = real
    check(data, labels, kind, demo[1].activations["mean"])


@pytest.mark.real_data
@pytest.mark.slow
def test_a_design_on_real_labels_that_the_solver_before_gave_up_is_certified(
    real: Rows,
) -> None:
    """Seed 3 of the first four, as seed 0; C = 100."""
    _, data, _ = real
    problem = data.labels["problem_id"].to_numpy().astype(np.int64)
    value = data.labels["importance_signed"].to_numpy().astype(np.float64)
    train, columns = anchor_columns(problem, value)
    matrix = FoldMatrix(train, stand_in_states(problem, 700, 3))
    found = solve_logistic(matrix, columns, np.full(len(columns), 100.0), tol=3e-4)
    assert found.is_converged.all()
    assert found.bound.max() <= 3e-4
