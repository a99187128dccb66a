"""From what Dask hands a scheduler to task records in shards.

::

    Expr, HighLevelGraph, dict
      │  materialize     culled dict of nodes, annotations by key; what cannot work is refused
      │  ShardedGraph.of dask.order, cut into contiguous shards where few results cross
      │  .packs()        shard records and large constants, a pack at a time
      ▼  .plan()         what is written last

Nothing here reads or writes the store.
"""

from burst_dask.graph.cutting import cut
from burst_dask.graph.reading import Annotations, MissingKey, Outside, materialize, without
from burst_dask.graph.shards import LargeConstantWarning, ShardedGraph, unpack_outputs
from burst_dask.graph.stored import Captured, Stored

__all__ = [
    "Annotations",
    "Captured",
    "LargeConstantWarning",
    "MissingKey",
    "Outside",
    "ShardedGraph",
    "Stored",
    "cut",
    "materialize",
    "unpack_outputs",
    "without",
]
