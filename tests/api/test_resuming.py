"""Sessions that are resumed: what is found again, what is computed, and what is said about the rest."""

from __future__ import annotations

import operator
import threading
import warnings

import dask
import dask.array as da
import dask.bag as db
import numpy as np
import pytest
from acting import Gate, until

from burst_dask import ResumeWarning, Session, sync
from burst_dask.client.shapes import numbers
from burst_dask.client.submission import Asked
from burst_dask.protocol import keys
from burst_dask.worker.tender import Tender

#: Spares Dask to find out by a call.
META = np.array((), "i8")
#: What tasks have done; workers are threads of this process.
RAN: list = []


def note(value, name=None):
    RAN.append(name or value)
    return value


def double(value):
    RAN.append(value)
    return 2 * value


def triple(value):
    RAN.append(value)
    return 3 * value


def fails_once(value, place):
    if not place.exists():
        place.touch()
        raise ValueError("not yet")
    return note(value)


class Slippery:
    """Has another token in each process."""

    def __dask_tokenize__(self):
        return object.__repr__(self)


@pytest.fixture(autouse=True)
def nothing_ran():
    RAN.clear()


def ran():
    """Return what has run since the last call."""
    found, RAN[:] = sorted(RAN, key=str), []
    return found


def runs(session):
    return len(session.status().runs)


# ---------------------------------------------------------------------------- the same graph


def graph():
    parts = [dask.delayed(double)(n, dask_key_name=f"part-{n}") for n in range(4)]
    return dask.delayed(sum)(parts, dask_key_name="total")


def test_the_same_graph_is_the_same_run(again):
    first = again().compute(graph())
    assert first.result() == (12,) and ran() == [0, 1, 2, 3]
    session = again()
    second = session.compute(graph())
    assert (second.id, second.result(), ran()) == (first.id, (12,), [])
    assert session.id == first.id.partition(".")[0] and runs(session) == 1


def test_a_run_that_goes_on_is_joined(again, tmp_path):
    gate = Gate(tmp_path / "gate")
    waiting = dask.delayed(gate.wait)(5, dask_key_name="waiting")
    first = again().compute(waiting)
    second = again().compute(waiting)
    assert second.id == first.id and not second.done()
    gate.open()
    assert second.result() == (5,) == first.result()


def test_the_shape_of_the_answer_is_that_of_this_script(again):
    one, two = (dask.delayed(note)(n, dask_key_name=f"n-{n}") for n in (1, 2))
    again().compute(one, two).wait()
    session = again()
    assert session.compute({"a": two}, [one]).result() == ({"a": 2}, [1])
    assert session.compute(two).result() == (2,)
    assert list(session.compute(two).collect()) == ["n-2"]
    assert dict(session.compute(two).as_completed()) == {"n-2": 2}
    assert runs(session) == 1 and ran() == [1, 2]


@pytest.mark.parametrize(
    "build",
    [
        lambda: da.arange(8, chunks=2).map_blocks(double, meta=META),
        lambda: da.arange(8, chunks=2).map_blocks(double, meta=META).sum(),
        lambda: db.from_sequence(range(6), npartitions=3).map(double),
        lambda: dask.delayed(double, pure=True)(dask.delayed(double, pure=True)(4)),
    ],
)
def test_collections_are_known_again(again, build):
    expected = build().compute(scheduler=again())
    assert ran()
    value = build().compute(scheduler=again())
    assert str(value) == str(expected) and ran() == []


def test_persisted_collections_stay_where_they_are(again):
    def build(session):
        kept = session.persist(da.arange(8, chunks=2).map_blocks(double, meta=META))
        return kept.sum().compute(scheduler=session)

    assert build(again()) == 56 and ran()
    session = again()
    assert build(session) == 56 and ran() == [] and runs(session) == 2


# ---------------------------------------------------------------------------- another graph


def test_a_changed_graph_uses_what_has_the_same_key(again):
    again().compute(*(dask.delayed(double)(n, dask_key_name=f"part-{n}") for n in range(3))).wait()
    assert ran() == [0, 1, 2]
    more = [dask.delayed(double)(n, dask_key_name=f"part-{n}") for n in range(5)]
    session = again()
    assert session.compute(dask.delayed(sum)(more, dask_key_name="all"), more[0]).result() == (20, 0)
    assert ran() == [3, 4]


def test_a_changed_function_under_the_same_key_runs(again):
    def build(function):
        part = dask.delayed(function)(3, dask_key_name="part")
        return dask.delayed(note)(part, dask_key_name="after")

    assert again().compute(build(double)).result() == (6,)
    ran()
    assert again().compute(build(triple)).result() == (9,) and ran() == [3, 9]
    assert again().compute(build(triple)).result() == (9,) and ran() == []


def test_what_went_from_one_shard_to_another_is_used_again(again):
    names = [f"n-{n}" for n in range(40)]
    parts = {name: (note, n) for n, name in enumerate(names)}
    assert again().get({**parts, "all": (len, names)}, "all") == 40
    assert len(ran()) == 40
    session = again()
    assert session.get({**parts, "all": (sorted, names)}, "all") == list(range(40))
    externals = sync.run(session._link.view(session.status().runs[-1].id)).plan.externals
    assert externals and len(ran()) == 40 - len(externals)


def test_failed_tasks_are_tried_again(again, tmp_path):
    place = tmp_path / "mark"
    good = dask.delayed(note)(1, dask_key_name="good")
    bad = dask.delayed(fails_once)(good, place, dask_key_name="bad")
    first = again().compute(good, bad)
    with pytest.raises(ValueError, match="not yet"):
        first.result()
    first.wait()
    assert ran() == [1]
    assert again().compute(good, bad).result() == (1, 1) and ran() == [1]  # of `bad`


def test_a_run_in_which_something_failed_is_replaced(again, tmp_path):
    gate = Gate(tmp_path / "gate")
    bad = dask.delayed(fails_once)(1, tmp_path / "mark", dask_key_name="bad")
    slow = [dask.delayed(gate.wait)(n, dask_key_name=f"slow-{n}") for n in range(2)]
    first = again(workers=3).compute(bad, *slow)
    with pytest.raises(ValueError, match="not yet"):
        first.result()
    session = again(workers=3)
    second = session.compute(bad, *slow)
    assert second.id != first.id
    gate.open()
    assert second.result() == (1, 0, 1)
    assert session._link.state.cancelled == {first.id}


def test_an_unfinished_run_whose_intermediate_results_are_used_is_replaced(again, tmp_path):
    gate = Gate(tmp_path / "gate")
    # Those of earlier shards are stored, because a task of a later one needs them.
    parts = {f"n-{n}": (note, n) for n in range(40)}
    first = again()._submit({**parts, "slow": (gate.wait, list(parts))}, "slow", Asked())
    while first.status().completed < 40:
        pass
    ran()
    session = again()
    second = session._submit({**parts, "all": (sorted, list(parts))}, "all", Asked())
    used = second._view.plan.externals
    assert {run for run, _ in used} == {first.id} == set(session._link.state.cancelled)
    assert second.result() == list(range(40)) and len(ran()) == 40 - len(used)
    gate.open()


@pytest.fixture
def unfinished(again, tmp_path):
    """A run whose intermediate results are stored, and which waits for a gate; that, and its graph."""
    gate = Gate(tmp_path / "gate")
    # Those of earlier shards are stored, because a task of a later one needs them.
    parts = {f"n-{n}": (note, n) for n in range(40)}
    dsk = {**parts, "slow": (gate.wait, list(parts))}
    run = again()._submit(dsk, "slow", Asked())
    while run.status().completed < 40:
        pass
    yield run, dsk, gate
    gate.open()


def test_a_run_that_something_here_waits_for_is_not_replaced(again, unfinished):
    first, dsk, gate = unfinished
    session = again()
    joined = session._submit(dsk, "slow", Asked())
    other = session._submit({**dsk, "all": (sorted, list(dsk)[:40])}, "all", Asked())
    assert joined.id == first.id and other.id != first.id and not other._view.plan.externals
    gate.open()
    assert other.result() == list(range(40)) == joined.result()
    assert not session._link.state.cancelled


@pytest.mark.parametrize("order", [1, -1])
def test_a_run_is_not_cancelled_of_which_a_new_one_awaits_a_result(again, unfinished, order):
    first, dsk, gate = unfinished
    session = again()
    needs = ["slow", "all"][::order]
    second = session._submit({**dsk, "all": (sorted, list(dsk)[:40]), "both": (list, needs)}, "both", Asked())
    gate.open()
    assert second.result(timeout=30) == [list(range(40))] * 2
    used = {number for _, number in second._view.plan.externals}
    awaits = not used.isdisjoint(numbers(first._view.plan.outputs))
    assert awaits != (first.id in session._link.state.cancelled)


def test_results_that_were_deleted_are_computed_again(again):
    session = again(inline_result=1, inline_entry=1)
    run = session.compute(*(dask.delayed(note)(n, dask_key_name=f"n-{n}") for n in range(3)))
    run.wait()
    assert ran() == [0, 1, 2]
    store = session._link.store

    async def delete():
        segments = [meta.key async for page in store.list(keys.run_prefix(run.id) + "segments/") for meta in page]
        await store.delete(segments)
        return segments

    assert sync.run(delete())
    assert again().compute(dask.delayed(note)(0, dask_key_name="n-0")).result() == (0,) and ran() == [0]


# ---------------------------------------------------------------------------- calls


def test_calls_are_known_again(again):
    session = again()
    named = session.map(double, range(3), key="part")
    pure = session.submit(double, 7, pure=True)
    total = session.submit(sum, named, key="total")
    assert (total.result(), pure.result()) == (6, 14)
    assert ran() == [0, 1, 2, 7]
    session = again()
    named = session.map(double, range(4), key="part")
    total = session.submit(sum, named, key="total")
    assert session.submit(double, 7, pure=True).result() == 14
    assert session.gather(named) == [0, 2, 4, 6]
    assert total.result() == 12  # as it depends on more than before
    assert ran() == [3]


def test_calls_that_go_on_are_followed_and_not_cancelled_for_others(again, tmp_path):
    gate = Gate(tmp_path / "gate")
    first = again()
    futures = first.map(gate.wait, range(3), key="wait")
    first.flush()
    session = again()
    one = session.submit(gate.wait, 0, key="wait-0")
    session.flush()
    later = session.submit(gate.wait, 1, key="wait-1")
    session.flush()
    assert one.cancel()
    gate.open()
    assert later.result() == 1 and first.gather(futures) == [0, 1, 2]
    assert runs(session) == 1


def test_a_call_that_was_cancelled_and_what_needs_it_are_made_anew(again):
    first = again(workers=None, fleet=None)  # nobody writes down that it is cancelled
    part, _other = first.submit(double, 4, key="part"), first.submit(double, 5, key="other")
    first.submit(note, part, key="after")
    first.flush()
    assert part.cancel()
    first._futures.follower.stop()
    session = again(workers=2)
    made = [session.submit(double, 4, key="part"), session.submit(double, 5, key="other")]
    assert session.gather([*made, session.submit(note, made[0], key="after")]) == [8, 10, 8]
    assert ran() == [4, 5, 8]
    assert runs(session) in (2, 3)  # in one new run, or in two when this process was too slow to write them together


def test_a_call_that_was_cancelled_while_a_worker_had_it_reserved_is_made_anew(again, tmp_path, monkeypatch):
    gate, heeds, cancel = Gate(tmp_path / "gate"), threading.Event(), Tender.cancel
    monkeypatch.setattr(Tender, "cancel", lambda tender, tasks: cancel(tender, tasks) if heeds.is_set() else None)
    first = again(workers=1, session_poll=0.02, commit_interval=0.02)
    try:
        first.submit(gate.wait, 0, key="hold", priority=1)  # so that it runs first, on the only thread
        part = first.submit(double, 4, key="part")
        first.flush()
        until(lambda: first.status().runs[0].running == 2)
        assert part.cancel()
        first._futures.follower.stop()
        session = again(workers=None, fleet=None)
        made = session.submit(double, 4, key="part")
        session.flush()  # it is decided by now what becomes of it
        assert session.status().runs[0].cancelled == 0
        heeds.set()
        until(lambda: session.status().runs[0].cancelled == 1)  # though the thread is not free
    finally:
        gate.open()
    assert made.result() == 8 and ran() == [4] and runs(session) == 2


def test_a_call_has_a_copy_of_what_was_an_intermediate_result(again, unfinished):
    first, _, gate = unfinished
    gate.open()
    first.wait()
    ran()
    session = again()
    futures = session.map(note, range(40), key="n")
    assert session.gather(futures) == list(range(40))
    assert len(ran()) < 40
    assert all(session._link.futures[future.key][0] != first.id for future in futures)


def test_calls_are_part_of_graphs(again):
    def build(session):
        part = session.submit(double, 4, key="part")
        return dask.delayed(note)(part, dask_key_name="after").compute(scheduler=session)

    assert build(again()) == 8 and ran() == [4, 8]
    assert build(again()) == 8 and ran() == []


# ---------------------------------------------------------------------------- what is said


def said(build):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        build()
    return [str(one.message) for one in found if one.category is ResumeWarning]


def test_random_keys_are_named_once(again):
    session = again()

    def build():
        parts = [dask.delayed(double)(n) for n in range(3)]
        session.compute(dask.delayed(sum)(parts, dask_key_name="total"), dask.delayed(note)(1)).wait()

    (message,) = said(build)
    assert message.startswith("4 tasks have keys that are others in each process")
    assert "'double' (3, such as 'double-" in message and "'note' (1, such as 'note-" in message
    assert "dask_key_name=" in message and "pure=True" in message
    assert said(build) == []
    (message,) = said(lambda: [session.submit(triple, n) for n in range(2)] and session.flush())
    assert message.startswith("2 tasks") and "triple-" in message


def test_below_a_result_that_is_known_random_keys_do_not_matter(again):
    def build(session):
        part = dask.delayed(double)(2)
        return session.compute(dask.delayed(note)(part, dask_key_name="total")).result()

    assert said(lambda: build(again())) and ran() == [2, 4]
    assert said(lambda: build(again())) == [] and ran() == []


def test_tokens_that_are_others_in_each_process_are_named(again):
    def build(session, what):
        return session.compute(dask.delayed(isinstance, pure=True)(what, Slippery)).result()

    assert said(lambda: build(again(), Slippery())) == []
    (message,) = said(lambda: build(again(), Slippery()))
    assert message.startswith("1 tasks look as in an earlier run and have other keys") and "'isinstance' (1" in message
    assert "not deterministic across interpreters" in message
    assert said(lambda: build(again(), threading.Thread)) == []  # another one


def test_a_session_that_is_not_resumed_neither_finds_nor_warns(again, tmp_path):
    again().compute(graph()).wait()
    ran()
    other = Session(f"memory://{tmp_path.name}", name="nightly", workers=1, progress=False)
    assert said(lambda: other.compute(graph(), dask.delayed(note)(1)).wait()) == []
    assert ran() == [0, 1, 1, 2, 3]
    other.cleanup(force=True)


# ---------------------------------------------------------------------------- what it costs


def test_few_requests_find_many_tasks(again):
    names = [("x", n) for n in range(3000)]
    many = {name: (operator.neg, n) for n, name in enumerate(names)} | {"total": (sum, names)}
    again().get(many, "total")
    session = again(workers=None, fleet=None)  # what workers in this process send is counted with their session
    before = sum(session.requests.values())
    run = session._submit(many, "total", Asked())
    shards = len(run._view.plan.shards)
    # The plan, the keys of all shards in one, the newest entry of each shard, a listing or two, and the session log.
    assert sum(session.requests.values()) - before <= shards + 6


def test_runs_that_cannot_be_read_are_of_no_use_and_no_harm(again):
    session = again()
    run = session.compute(graph())
    run.wait()
    ran()
    sync.run(session._link.store.put(keys.pack(run.id, 0), b"damaged"))
    assert again().compute(graph()).result() == (12,) and ran() == [0, 1, 2, 3]
