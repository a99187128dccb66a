"""From one run to the others whose results it depends on (`Plan.externals`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from burst_dask.errors import CorruptObject, ProtocolError
from burst_dask.journal.outcomes import TaskOutcome
from burst_dask.journal.view import RunView, in_parallel
from burst_dask.protocol import keys
from burst_dask.protocol.keys import RunId
from burst_dask.protocol.records import Plan
from burst_dask.store.base import Store


async def open_others(
    view: RunView, runs: Iterable[RunId] | None = None, known: Mapping[RunId, RunView] | None = None
) -> None:
    """Read the plans of the runs that externals of a run lie in; afterwards the view knows the way there.

    Parameters
    ----------
    runs
        Those to read; by default all.
    known
        Views that the caller has anyway: sharing them, each learns what the other learns.
    """
    known = known or {}

    async def other(run: RunId) -> RunView:
        found = known.get(run) or await type(view).open(view.store, run)
        if found is None:
            raise CorruptObject(f"{keys.plan(run)}: run {view.run} depends on it, and it is gone")
        return found

    wanted = dict.fromkeys((run for run, _ in view.plan.externals) if runs is None else runs)
    missing = [run for run in wanted if run not in view.others]
    view.others.update(zip(missing, await in_parallel(other, missing), strict=True))


def describe(plan: Plan, task: int) -> str:
    """Return the words for a task or external."""
    if 0 <= task - plan.tasks < len(plan.externals):
        run, number = plan.externals[task - plan.tasks]
        return f"task {number} of run {run}"
    return f"task {task}"


async def outcomes(store: Store, plan: Plan) -> dict[int, bool | None]:
    """Return for each external, by its global number, whether it is done; None of one that has no outcome yet.

    Those of runs that cannot be read are left out.
    """
    view = RunView(store, plan)

    async def read(run: RunId) -> None:
        try:
            await open_others(view, [run])
            await view.others[run].survey()
        except CorruptObject:
            view.others.pop(run, None)

    await in_parallel(read, dict.fromkeys(run for run, _ in plan.externals))
    found: dict[int, bool | None] = {}
    for number, (run, _) in enumerate(plan.externals, plan.tasks):
        if run in view.others:
            outcome = view.outcome(number)
            found[number] = None if outcome is None else outcome.done
    return found


async def settled(view: RunView, task: int) -> tuple[RunView, int, TaskOutcome]:
    """Return where a task or external lies, and its outcome, which some entry has named already."""
    if task >= view.plan.tasks:
        await open_others(view, [view.plan.externals[task - view.plan.tasks][0]])
    view, number = view.home(task)
    while (found := view.outcome(number)) is None:
        # Its entry was written before the one that names it.
        if not await view.poll(view.owner(number)[0].id):
            raise ProtocolError(f"task {number} of run {view.run} is named as a cause and has no outcome")
    return view, number, found


async def culprit(view: RunView, task: int) -> tuple[RunView, int]:
    """Return the run and the task whose error a failed task or external has, through as many runs as need be."""
    view, number, outcome = await settled(view, task)
    while outcome.cause != number:
        if outcome.cause is None:
            raise ProtocolError(f"task {number} of run {view.run} did not fail")
        view, number, outcome = await settled(view, outcome.cause)
    return view, number


async def error(view: RunView, task: int) -> memoryview:
    """Return the body of the failure that a failed task or external comes from."""
    view, number = await culprit(view, task)
    found = view.outcome(number)
    if found is None or found.location is None:
        raise ProtocolError(f"the error of task {number} of run {view.run} was not stored")
    return (await view.fetch([number]))[number]
