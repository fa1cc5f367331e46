"""Stored attention mass to tables: scores of sentences, figures of heads, receiver heads by fold.

In: the mass of each problem at one layer; later the tables of every layer. Out: tables under the
contracts of `tables.attention`. What does not belong here: the definitions (attention), and where
shards and tables are kept (pipeline).

The invariant: everything follows from the mass; a fold's heads are chosen on its training problems
alone; a value that a definition leaves open is null.
"""

from taprobe_core.attention_tables.receivers import receiver_tables
from taprobe_core.attention_tables.variants import variant_scores
from taprobe_core.attention_tables.vertical import VERTICAL_TABLES, vertical_tables

__all__ = ["VERTICAL_TABLES", "receiver_tables", "variant_scores", "vertical_tables"]
