"""Linear probes are scikit-learn's converged optimum, on demo and real labels (`benchmarks`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.probes.agreement import compare, demo_rows, real_rows, variants
from taprobe_core.probes.features import ProbeData
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
