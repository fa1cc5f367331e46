"""What is wrong with kept activations, as lines for an asset check.

In: the shards of one site and setting, by problem. Out: one line per fault. What does not belong
here: reading them from the store, and refusing to write them (pooling does).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch


def finite_faults(means: Mapping[int, torch.Tensor]) -> list[str]:
    """Return one line per problem whose means are not finite.

    Args:
        means: problem_id to [sentence, d_model].
    """
    faults = []
    for problem_id, mean in sorted(means.items()):
        bad = (~torch.isfinite(mean)).any(dim=1).nonzero().flatten().tolist()
        if bad:
            faults.append(
                f"problem {problem_id}: {len(bad)} of {len(mean)} sentences are not finite, first "
                f"sentence {bad[0]}"
            )
    return faults


def shape_faults(means: Mapping[int, torch.Tensor], n_sentences: Mapping[int, int]) -> list[str]:
    """Return one line per problem whose shard is absent, unknown, or of another shape.

    Args:
        means: problem_id to [sentence, d_model].
        n_sentences: problem_id to its number of spans.
    """
    faults = [f"problem {problem_id}: no shard" for problem_id in sorted({*n_sentences} - {*means})]
    widths = sorted({mean.shape[1] for mean in means.values()})
    if len(widths) > 1:
        faults.append(f"d_model differs between problems: {widths}")
    for problem_id, mean in sorted(means.items()):
        expected = n_sentences.get(problem_id)
        if expected is None:
            faults.append(f"problem {problem_id}: a shard, but no spans")
        elif len(mean) != expected:
            faults.append(f"problem {problem_id}: {len(mean)} rows for {expected} sentences")
    return faults
