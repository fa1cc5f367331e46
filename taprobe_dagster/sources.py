"""What the assets descend from but do not make: the dataset, observed per model and setting.

Concept: https://docs.dagster.io/guides/build/assets/metadata-and-tags/asset-observations
"""

import dagster as dg

from taprobe_core.study import Study
from taprobe_dagster.beta import accepted_beta
from taprobe_dagster.partitions import cell_of, grid_of
from taprobe_dagster.resources import Workbench


def dataset_source(study: Study) -> dg.SourceAsset:
    """The dataset as an observable source: its data version is the digest of its files."""
    grid = grid_of(study, "rollouts")

    with accepted_beta():

        @dg.observable_source_asset(
            name="dataset",
            group_name="dataset",
            description="Published rollouts: a hub revision, a mirror folder, or the demo world.",
            partitions_def=grid,
        )
        def dataset(workbench: dg.ResourceParam[Workbench]) -> dg.DataVersionsByPartition:
            plan = workbench.plan()
            keys = grid.get_partition_keys() if grid else []
            return dg.DataVersionsByPartition(
                {key: plan.dataset_version(*cell_of("rollouts", key)) for key in keys}
            )

    return dataset
