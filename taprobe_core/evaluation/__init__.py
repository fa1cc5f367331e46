"""How well recipes rank sentences: metrics, intervals, nulls, comparisons, tripwires.

blocks ─► units ─► summary      scores ─► metrics by problem ─► one row per recipe
            ├─► contrasts       differences from baselines and from control tasks
            ├─► nulls           what relabelling leaves
            └─► calibration     whether a probability means what it says
evaluate                        all of these tables of one cell
selection, intervals            what validation chooses; statistics of differences
tripwires                       is the pipeline of probes sound?
"""
