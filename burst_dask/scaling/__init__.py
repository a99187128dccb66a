"""How large a fleet should be, and who sees to it when no client is there.

::

    sizing      how many workers are wanted, and affordable (pure)
    spending    what workers have spent so far
    healer      starts what is missing: one at a time, whoever comes first

The wanted size, and each start of workers, are entries of the session log. Whoever starts workers first
appends START to the slot behind the state by which it decided; so of all that decide at the same time one
goes on, and the others see its entry and count anew. No scheduler, and no election besides this.
"""
