"""Probes that read token sets: attention, MultiMax and rolling MultiMax.

solve ─► training ─► learner    columns ─► stacks ─► epochs ─► steps of AdamW
states, ragged                  the tokens, scaled once; who reads which of them
forward ─► pooling, backward    the network of a stack and its gradients
platt                           calibration of the scores
kernels, replay                 CUDA: memory-bound steps, recorded steps
"""
