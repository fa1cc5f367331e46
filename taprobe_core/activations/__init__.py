"""Run each text through the model once and keep what is wanted of every sentence.

In: the base transformer, texts and spans. Out: one shard per text and layer, pooled states
[sentence, d_model] and, where asked for, vertical attention. What does not belong here: loading the
model (checkpoints), placing sentences (spans), keeping shards (the store). Layer n is the output of
block n, before the final norm.

The invariant: one forward pass per text whatever the number of layers; no block after the deepest
requested layer runs; texts of one pack do not read each other; nothing that is not finite leaves
this package.
"""

from taprobe_core.activations.cost import BlockShape, bytes_of, pass_flop, sustained_gemm_rate
from taprobe_core.activations.extract import Extracted, extract
from taprobe_core.activations.faults import finite_faults, mass_faults, shape_faults
from taprobe_core.activations.forward import input_faults, pooled_layers, run_pack
from taprobe_core.activations.options import ExtractOptions
from taprobe_core.activations.pooling import FLOAT16_MAX, Pooling, Storage, pool, span_means
from taprobe_core.activations.progress import Progress
from taprobe_core.activations.shards import (
    ActivationShard,
    AttentionShard,
    shard_file,
    write_shard,
)
from taprobe_core.activations.tasks import TextTask, tasks_of

__all__ = [
    "FLOAT16_MAX",
    "ActivationShard",
    "AttentionShard",
    "BlockShape",
    "ExtractOptions",
    "Extracted",
    "Pooling",
    "Progress",
    "Storage",
    "TextTask",
    "bytes_of",
    "extract",
    "finite_faults",
    "input_faults",
    "mass_faults",
    "pass_flop",
    "pool",
    "pooled_layers",
    "run_pack",
    "shape_faults",
    "shard_file",
    "span_means",
    "sustained_gemm_rate",
    "tasks_of",
    "write_shard",
]
