"""Run each text through the model once and keep what is wanted of every sentence.

In: the base transformer, texts and spans. Out: one shard per text and layer, pooled states
[sentence, d_model] and, where asked for, vertical attention. What does not belong here: loading the
model (checkpoints), placing sentences (spans), keeping shards (the store). Layer n is the output of
block n, before the final norm.

The invariant: one forward pass per text whatever the number of layers; no block after the deepest
requested layer runs; texts of one pack do not read each other; nothing that is not finite leaves
this package.
"""
