"""What must hold of a run's objects at any moment, whatever has died: PROTOCOL.md, as checks of a store.

The simulator, the tests and ``burst doctor`` all use it. `burst_dask.testing.facts` reads everything once;
each check is a function of these `Facts`, in `burst_dask.testing.checks` with the rule that it holds.
"""

from __future__ import annotations

from functools import cache

from burst_dask.errors import InvariantBroken
from burst_dask.protocol.keys import RunId, ShardId
from burst_dask.store.base import Store
from burst_dask.testing.checks import CHECKS, entries_follow
from burst_dask.testing.facts import Facts, gather
from burst_dask.testing.reading import Violation

__all__ = ["CHECKS", "Facts", "Violation", "assert_run_invariants", "check_run", "violations_of"]


async def assert_run_invariants(store: Store, run: RunId, *, complete: bool = False) -> None:
    """Raise unless all rules hold of a run.

    Parameters
    ----------
    complete
        As of `check_run`.

    Raises
    ------
    InvariantBroken
        Lists what is wrong, with the story of each shard.

    Examples
    --------
    >>> import asyncio
    >>> from burst_dask.store import open_store
    >>> asyncio.run(assert_run_invariants(open_store("memory://nothing-here"), RunId("k3w9x2mq.7gfh2y")))
    Traceback (most recent call last):
    ...
    burst_dask.errors.InvariantBroken: run k3w9x2mq.7gfh2y breaks the protocol:
      rule 7: run k3w9x2mq.7gfh2y has no plan
    """
    violations = await check_run(store, run, complete=complete)
    if violations:
        raise InvariantBroken(f"run {run} breaks the protocol:\n  " + "\n  ".join(map(str, violations)))


async def check_run(store: Store, run: RunId, *, complete: bool = False) -> list[Violation]:
    """Return what is wrong with a run; nothing is, if all is well.

    The run may go on meanwhile. Every object of it is read once, and nothing is written.

    Parameters
    ----------
    complete
        Also every task must have its outcome.

    Raises
    ------
    StoreError
        The store does not answer. What is damaged in it is a violation, not an error.

    Examples
    --------
    >>> import asyncio
    >>> from burst_dask.store import open_store
    >>> found = asyncio.run(check_run(open_store("memory://nothing-here"), RunId("k3w9x2mq.7gfh2y")))
    >>> print(found[0])
    rule 7: run k3w9x2mq.7gfh2y has no plan
    """
    facts = await gather(store, run)
    return [*facts.session.violations, *violations_of(facts, complete=complete)]


def violations_of(facts: Facts, *, complete: bool = False) -> list[Violation]:
    """Return what is wrong with a run that was read, without what is wrong with its session."""
    violations = list(facts.violations)
    if facts.plan is None:
        return violations or [Violation("7", f"run {facts.run} has no plan")]
    explained: set[tuple[ShardId, int]] = set()
    story = cache(facts.story)
    for rule, check in CHECKS:
        if rule == "complete" and not (complete or facts.is_marked_complete):
            continue
        for finding in check(facts):
            if finding.shard is not None and finding.entry is not None:
                if check is entries_follow and (finding.shard, finding.entry) in explained:
                    continue  # a rule of its own says what is wrong with that entry
                explained.add((finding.shard, finding.entry))
            violations.append(Violation(rule, finding.what, () if finding.shard is None else story(finding.shard)))
    return violations
