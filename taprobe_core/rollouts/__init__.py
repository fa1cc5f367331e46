"""Rollouts: from a source of dataset files to checked tables.

`sources` finds files in a folder, `hub` on a hub; `fields` and `parse` read one problem,
`solutions` its resampled rollouts; `read` makes the tables of one model and setting and hashes what
they were made from. What the published measures mean as labels belongs in `labels`.
"""

from taprobe_core.rollouts.parse import ProblemRecord, parse_problem
from taprobe_core.rollouts.read import (
    RolloutTables,
    choose_problems,
    content_digest,
    listed_problems,
    open_source,
    problem_listing,
    read_rollouts,
    source_files,
)
from taprobe_core.rollouts.sources import (
    FILE_NAMES,
    FolderRollouts,
    RolloutSource,
    max_rollouts,
)

__all__ = [
    "FILE_NAMES",
    "FolderRollouts",
    "ProblemRecord",
    "RolloutSource",
    "RolloutTables",
    "choose_problems",
    "content_digest",
    "listed_problems",
    "max_rollouts",
    "open_source",
    "parse_problem",
    "problem_listing",
    "read_rollouts",
    "source_files",
]
