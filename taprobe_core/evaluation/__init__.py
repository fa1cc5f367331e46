"""How well recipes rank sentences: metrics, intervals, nulls, comparisons, tripwires."""
