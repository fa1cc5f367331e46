"""Run each text through the model once and keep the mean hidden state of every sentence.

In: the base transformer, texts and spans. Out: one shard per text and layer, [sentence, d_model].
What does not belong here: loading the model (checkpoints), placing sentences (spans), writing
shards (the store). Layer n is the output of block n, before the final norm.

The invariant: one forward pass per text whatever the number of layers; no block after the deepest
requested layer runs; nothing that is not finite leaves this package.
"""

from taprobe_core.activations.extract import ActivationShard, Extracted, extract
from taprobe_core.activations.faults import finite_faults, shape_faults
from taprobe_core.activations.forward import input_faults, pooled_layers
from taprobe_core.activations.pooling import FLOAT16_MAX, span_means, to_storage
from taprobe_core.activations.progress import Progress

__all__ = [
    "FLOAT16_MAX",
    "ActivationShard",
    "Extracted",
    "Progress",
    "extract",
    "finite_faults",
    "input_faults",
    "pooled_layers",
    "shape_faults",
    "span_means",
    "to_storage",
]
