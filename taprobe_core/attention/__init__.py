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

from taprobe_core.attention.mode import OFF, AttentionKind, AttentionMode

__all__ = ["OFF", "AttentionKind", "AttentionMode"]
