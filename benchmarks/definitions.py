"""Load time of the definitions of a large study, beside one flat grid of the same number of cells.

    python benchmarks/definitions.py

The study has 2 models (32 and 48 layers), 4 settings and 20 seeds: 6,400 trial cells. The peer is
the plainest thing Dagster can load with as many cells: assets on one static dimension, keys joined
by hand. Medians of CPU seconds over fresh definitions, in one process.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import dagster as dg

from taprobe_core.pipeline import STAGES, cells_of, stages_of
from taprobe_core.study import Study, parse_study
from taprobe_dagster.definitions import build_defs

STUDY = f"""
name: large
rollouts: {{source: {{kind: hub, repo: org/rollouts}}}}
models:
  a: {{rollouts_dir: a, checkpoint: {{kind: pretrained, path: org/a}}, n_layers: 32}}
  b: {{rollouts_dir: b, checkpoint: {{kind: pretrained, path: org/b}}, n_layers: 48}}
settings: [one, two, three, four]
seeds: {list(range(20))}
"""


def flat_defs(study: Study) -> dg.Definitions:
    """The same stages on one-dimensional grids of joined keys, without mappings."""
    return dg.Definitions(assets=[_flat(study, stage) for stage in stages_of(study)])


def _flat(study: Study, stage: str) -> dg.AssetsDefinition:
    cells = ["_".join(cell) for cell in cells_of(study, stage)]
    grid = dg.StaticPartitionsDefinition(cells) if STAGES[stage].grid else None

    @dg.asset(name=stage, deps=list(STAGES[stage].reads), partitions_def=grid)
    def flat() -> None: ...

    return flat


def load(build: Callable[[], dg.Definitions]) -> tuple[float, int]:
    """CPU seconds to build, validate and enumerate; and the cells of the largest asset."""
    start = time.process_time()
    defs = build()
    dg.Definitions.validate_loadable(defs)
    grid = defs.resolve_asset_graph().get(dg.AssetKey("probe_fits")).partitions_def
    assert grid is not None
    n_cells = len(grid.get_partition_keys())
    return time.process_time() - start, n_cells


def main() -> None:
    """Print medians and their ratio."""
    study = parse_study(STUDY, "benchmark")
    ours = [load(lambda: build_defs(study)) for _ in range(7)]
    flat = [load(lambda: flat_defs(study)) for _ in range(7)]
    assert ours[0][1] == flat[0][1] == 6400
    mine, peer = (statistics.median(each for each, _ in runs) for runs in (ours, flat))
    print(f"dagster {dg.__version__}, 6,400 trial cells, median of 7, CPU seconds")
    print(f"  paired grids with mappings, checks, automation   {mine:.2f}")
    print(f"  one flat dimension, no mappings                  {peer:.2f}")
    print(f"  ratio                                            {mine / peer:.2f}")


if __name__ == "__main__":
    main()
