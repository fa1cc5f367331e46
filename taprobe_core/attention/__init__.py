"""Which earlier sentences a text's attention goes back to: mass between sentences, then scores.

In: queries and keys of one text at one layer, after rotary embedding, and the spans of its
sentences. Out: the mass of every sentence on every other, kept once (`sentence_mass`; `tail_mass`
for the last tokens alone), and from it in float64 every published score: vertical scores, kurtosis,
receiver heads, the simple scores of an earlier system, and what else explains them.

What does not belong here: running a model and taking its queries and keys (activations), writing
shards (the store). No module reads or writes a file.

The invariant: no tensor of tokens x tokens is ever made; the mass is that of exact causal softmax
attention to float32 rounding; receiver heads are chosen on training problems alone.
"""

from taprobe_core.attention.confounds import (
    DistanceLaw,
    SinkShare,
    distance_law,
    near_diagonal_share,
    sink_share,
)
from taprobe_core.attention.mass import SentenceMass, TailMass, sentence_mass, tail_mass
from taprobe_core.attention.mode import OFF, AttentionKind, AttentionMode
from taprobe_core.attention.receivers import (
    ReceiverHead,
    ReceiverHeads,
    SplitHalf,
    choose_receiver_heads,
    receiver_scores,
    split_half_reliability,
)
from taprobe_core.attention.scores import (
    DepthControl,
    ProximitySensitivity,
    average_matrix,
    head_kurtosis,
    proximity_sensitivity,
    vertical_scores,
)
from taprobe_core.attention.simple import SimpleDepthControl, full_scores, light_scores
from taprobe_core.attention.weights import sentence_mass_of, tail_mass_of

__all__ = [
    "OFF",
    "AttentionKind",
    "AttentionMode",
    "DepthControl",
    "DistanceLaw",
    "ProximitySensitivity",
    "ReceiverHead",
    "ReceiverHeads",
    "SentenceMass",
    "SimpleDepthControl",
    "SinkShare",
    "SplitHalf",
    "TailMass",
    "average_matrix",
    "choose_receiver_heads",
    "distance_law",
    "full_scores",
    "head_kurtosis",
    "light_scores",
    "near_diagonal_share",
    "proximity_sensitivity",
    "receiver_scores",
    "sentence_mass",
    "sentence_mass_of",
    "sink_share",
    "split_half_reliability",
    "tail_mass",
    "tail_mass_of",
    "vertical_scores",
]
