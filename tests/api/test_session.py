"""Sessions: opening, submitting, being Dask's scheduler, coming back, and the end."""

import pickle
import threading

import dask
import dask.array as da
import dask.bag as db
import pytest
from acting import fails_twice
from dask.callbacks import Callback

from burst_dask import Session, attach, sync
from burst_dask.clock import SystemClock
from burst_dask.errors import ConfigError, StoreUnavailable, UnknownId, UnpicklableTask
from burst_dask.protocol import keys
from burst_dask.store import Retrying, open_store
from burst_dask.store.wrappers import Counting, Fault, Faulty


@pytest.fixture
def alone(tmp_path):
    """A session without workers."""
    return Session(tmp_path / "store", fleet=None, progress=False)


def names(store, prefix=""):
    """Return all keys below `prefix`."""

    async def listed():
        return [meta.key async for page in store.list(prefix) for meta in page]

    return sync.run(listed())


# ---------------------------------------------------------------------------- as Dask's scheduler


def test_dask_takes_it_as_a_scheduler(burst):
    x = da.arange(100, chunks=10)
    assert dask.compute({"sum": x.sum()}, [x.max(), 1], scheduler=burst) == ({"sum": 4950}, [99, 1])


def test_it_returns_what_dasks_schedulers_return(burst):
    dsk = {"x": 1, "y": (sum, ["x", 2]), ("z", 0): (sum, ["y", "y"])}
    for wanted in ("y", ["y"], [["x", ("z", 0)], ["y"]], []):
        assert burst.get(dsk, wanted) == dask.threaded.get(dsk, wanted)


def test_as_the_default_scheduler(burst):
    bag = db.from_sequence(range(20), npartitions=4)
    with burst:
        assert dask.base.get_scheduler() is burst
        with burst:
            assert dict(bag.groupby(lambda i: i % 2).compute())[1] == list(range(1, 20, 2))
        assert dask.config.get("scheduler") is burst
    assert dask.config.get("scheduler", None) is None
    assert dask.config.get("dataframe.shuffle.method", None) is None


def test_an_exception_of_a_task_is_raised_as_itself(burst):
    def divide(a):
        return 1 / a

    with pytest.raises(ZeroDivisionError) as caught:
        dask.delayed(divide)(0).compute(scheduler=burst)
    assert caught.traceback[-1].name == "divide"
    with pytest.raises(ZeroDivisionError):  # the cause of what was asked for, not the dependent's own
        burst.get({"x": (divide, 0), "y": (sum, ["x", 1])}, "y")


def test_a_failed_blocking_run_is_cancelled(burst):
    with pytest.raises(ZeroDivisionError):
        burst.get({"x": (divmod, 1, 0)}, "x")
    sync.run(burst._link.follow())
    assert burst._link.state.cancelled == set(burst._link.state.runs)


def test_keywords(burst):
    dsk = {"x": (sum, [1, 2])}
    assert burst.get(dsk, "x", num_workers=3, pool=None, chunksize=2, sync=True, workers=None, priority=5) == 3
    assert burst.compute(dask.delayed(1), priority=2, retries=1)._view.plan.priority == 2
    with pytest.raises(ConfigError, match=r"cache=\{\} is refused: results are in the store"):
        burst.get(dsk, "x", cache={})
    with pytest.raises(ConfigError, match="retris=3 is refused: this scheduler knows no such keyword"):
        burst.get(dsk, "x", retris=3)
    with pytest.raises(ConfigError, match="retries=-1"):
        burst.get(dsk, "x", retries=-1)
    with pytest.raises(ConfigError, match="retries='2'"):
        burst.get(dsk, "x", retries="2")
    with pytest.raises(ConfigError, match="resources=3"):
        burst.get(dsk, "x", resources=3)
    with pytest.raises(ConfigError, match="timeout=0 of a task"):
        burst.get(dsk, "x", task_timeout=0)
    with pytest.raises(ConfigError, match="retry_on=<class 'int'>"):
        burst.get(dsk, "x", retry_on=int)
    assert burst.get(dsk, "x", task_timeout=60, retry_on=OSError) == 3


def test_retries(burst, tmp_path):
    task = dask.delayed(fails_twice)(str(tmp_path / "tries"))
    assert task.compute(scheduler=burst, retries=2) == "done"


def test_a_session_whose_start_fails_stops_its_workers_though_the_store_is_away(tmp_path, monkeypatch):
    removed = []

    async def away(*_, **__):
        raise StoreUnavailable("the store is away")

    monkeypatch.setattr("burst_dask.client.link.Link.start_workers", away)

    def remove(fleet):
        removed.append(fleet)

    monkeypatch.setattr("burst_dask.api.session.close", away)
    monkeypatch.setattr("burst_dask.fleet.local.LocalFleet.remove", remove)
    with pytest.raises(StoreUnavailable, match="away"):
        Session(tmp_path / "store", workers=1, progress=False)
    assert len(removed) == 1


def test_callbacks_are_not_called(burst):
    called = []
    with Callback(start=called.append, pretask=lambda *a: called.append(a)):
        assert dask.delayed(sum)([1, 2]).compute(scheduler=burst) == 3
    assert not called


def test_a_session_cannot_be_part_of_a_task(burst):
    with pytest.raises(ConfigError, match="attach"):
        pickle.dumps(burst)
    with pytest.raises(UnpicklableTask, match="variable burst of function"):
        dask.delayed(lambda: burst.id)().compute(scheduler=burst)


# ---------------------------------------------------------------------------- opening


def test_bad_arguments_leave_nothing(tmp_path):
    place = tmp_path / "store"
    for arguments, message in [
        ({"workers": 0}, "burst worker --session"),
        ({"workers": 2.5}, "whole number"),
        ({"workers": 2, "fleet": None}, "burst worker --session"),
        ({"fleet": "lokal"}, "'local', 'ecs', 'distributed' or None"),
        ({"lease": 5}, "two heartbeats"),
        ({"threads": 0}, "threads=0"),
        ({"heartbeats": 5.0}, "did you mean 'heartbeat'"),
        ({"region": "eu-west-1"}, "region"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Session(place, **arguments)
    assert not place.exists()
    with pytest.raises(ConfigError, match="ftp"):
        Session("ftp://host/path")
    with pytest.raises(ConfigError, match="takes no options"):
        Session(open_store("memory://x"), endpoint_url="http://host")


def test_settings_are_kept_for_workers_and_later_clients(alone, tmp_path):
    session = Session(tmp_path / "store", fleet=None, name="nightly", lease=60, threads=2)
    status = attach(session.id, store=session.store).status()
    assert (status.name, status.settings["lease"], status.settings["threads"]) == ("nightly", 60, 2)
    assert "nightly" in str(status) and status.to_dict()["runs"] == []


def test_a_session_whose_opening_fails_is_not_listed(tmp_path):
    inner = open_store(tmp_path / "store")
    Session(inner, fleet=None)  # leaves the mark of the probe
    before = names(inner, keys.SESSIONS)

    def fail_manifest(verb, key):
        return Fault.BEFORE if key.startswith(keys.SESSIONS) else None

    with pytest.raises(StoreUnavailable):
        Session(Faulty(inner, fail_manifest), fleet=None)
    assert names(inner, keys.SESSIONS) == before


# ---------------------------------------------------------------------------- submitting


class Written:
    """Remembers the keys that were written, in order."""

    def __init__(self, inner):
        self.inner = inner
        self.keys = []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    async def put(self, key, body):
        await self.inner.put(key, body)
        self.keys.append(key)

    async def create(self, key, body):
        created = await self.inner.create(key, body)
        self.keys.append(key)
        return created


def test_the_plan_is_written_last():
    store = Written(open_store("memory://written"))
    session = Session(store, fleet=None)
    store.keys.clear()
    data = [bytes([n]) * 5_000_000 for n in range(5)]
    run = session.compute(*[dask.delayed(len)(item) for item in data])
    *packs, plan, entry = store.keys
    assert len(packs) > 1 and all("/packs/" in key for key in packs)
    assert plan == keys.plan(run.id) and entry.startswith(keys.session_log(session.id))


def test_a_failed_submission_leaves_nothing():
    def fail(verb, key):
        return Fault.BEFORE if key.endswith("/plan") and verb == "put" else None

    store = open_store("memory://failed-submission")
    session = Session(Faulty(store, fail), fleet=None)
    before = names(store)
    with pytest.raises(StoreUnavailable):
        session.compute(dask.delayed(len)("x" * 100_000))
    with pytest.raises(UnpicklableTask, match="Nothing was submitted"):
        session.compute(dask.delayed(len)(i for i in "x"))
    assert names(store) == before


def test_a_large_graph_takes_few_requests(alone):
    before = alone.requests
    alone.compute(dask.delayed(sum)([dask.delayed(abs)(n) for n in range(3000)]))
    dsk = {("x", n): (abs, n) for n in range(100_000)}
    plan_before = alone.requests
    from burst_dask.client.submission import Asked, submit

    submit(alone._link, dsk, list(dsk), Asked())
    sent = {verb: count - plan_before[verb] for verb, count in alone.requests.items()}
    assert sent["put"] + sent["create"] <= 60 and sum(sent.values()) <= 60
    assert plan_before["put"] - before["put"] <= 3


def test_nothing_to_compute(alone):
    with pytest.raises(ConfigError, match="nothing to compute"):
        alone.compute(1, [2])


def test_what_cannot_be_repacked_is_refused(alone):
    with pytest.raises(UnpicklableTask, match="beside the collections"):
        alone.compute([dask.delayed(1), threading.Lock()])


# ---------------------------------------------------------------------------- coming back


def test_attach_to_a_session_and_go_on(burst):
    again = attach(burst.id, store=burst._link.store)
    assert again.id == burst.id and again.store == burst.store
    run = again.compute(dask.delayed(sum)([1, 2]))
    assert run.result(timeout=30) == (3,)
    assert [r.state for r in burst.status().runs] == ["done"]


def test_unknown_ids_name_near_misses(alone):
    run = alone.compute(dask.delayed(1))
    near = alone.id[:-1] + ("2" if alone.id[-1] != "2" else "3")
    with pytest.raises(UnknownId, match=f"no session '{near}'; did you mean {alone.id}"):
        attach(near, store=alone.store)
    with pytest.raises(UnknownId, match=f"did you mean {run.id}"):
        attach(run.id[:-1] + "2", store=alone.store)
    with pytest.raises(UnknownId, match="was cleaned up, or lies in another store"):
        attach("zzzzzzzz", store="memory://nothing-here")
    for nonsense in ("no/slash", "x" * 100):  # a name is any text
        with pytest.raises(UnknownId, match=f"no session '{nonsense}'"):
            attach(nonsense, store=alone.store)
    for nonsense in ("", None, 7):
        with pytest.raises(ConfigError, match="not the id"):
            attach(nonsense, store=alone.store)


# ---------------------------------------------------------------------------- the end


def test_cleanup_refuses_while_work_is_running(alone):
    run = alone.compute(dask.delayed(1) + 1)
    before = names(alone._link.store)
    with pytest.raises(ConfigError, match=rf"still works on {run.id}; nothing was done"):
        alone.cleanup()
    assert names(alone._link.store) == before
    run.cancel()
    alone.cleanup()


def test_cleanup_keeps_results_unless_forced(burst):
    run = burst.compute(dask.delayed("x" * 100).upper() + "!")
    answer = run.result(timeout=30)
    store = burst._link.store
    burst.cleanup()
    left = names(store, keys.session_prefix(burst.id))
    assert left and not [key for key in left if "/packs/" in key]
    assert attach(run.id, store=store).result(timeout=5) == answer
    with pytest.raises(ConfigError, match="is closed"):
        burst.compute(dask.delayed(1))
    burst.cleanup()


def test_forced_cleanup_deletes_this_session_and_no_other(tmp_path):
    store = open_store("memory://two-sessions")
    one, two = Session(store, fleet=None), Session(store, fleet=None)
    one.compute(dask.delayed(1))
    two.compute(dask.delayed(2))
    others = [key for key in names(store) if one.id not in key]
    one.cleanup(force=True)
    assert names(store) == others
    one.cleanup(force=True)
    assert names(store) == others
    with pytest.raises(UnknownId):
        attach(one.id, store=store)


def test_an_interrupted_cleanup_can_be_repeated():
    store = open_store("memory://interrupted")
    session = Session(store, fleet=None)
    session.compute(dask.delayed(1))
    logs = keys.session_log(session.id)

    def fail(verb, key):
        return Fault.BEFORE if verb == "delete" and key == keys.manifest(session.id) else None

    broken = attach(session.id, store=Faulty(store, fail))
    with pytest.raises(StoreUnavailable):
        broken.cleanup(force=True)
    assert names(store, logs) == []
    attach(session.id, store=store).cleanup(force=True)
    assert [key for key in names(store) if session.id in key] == []


def test_cleanup_deletes_more_keys_than_one_page():
    store = Retrying(Counting(open_store("memory://many-keys")), SystemClock(), None)
    session = Session(store, fleet=None)

    async def fill():
        for number in range(2500):
            await store.put(f"{keys.session_prefix(session.id)}runs/x/segments/00000/{number:05d}", b"")

    sync.run(fill())
    session.cleanup(force=True)
    assert [key for key in names(store) if session.id in key] == []


def test_scale_starts_and_stops_workers(burst):
    assert burst._link.fleet.alive() == 2
    burst.scale(1)
    assert burst._link.fleet.alive() == 1
    burst.scale(0)
    assert burst._link.fleet.alive() == 0
    run = burst.compute(dask.delayed(sum)([1, 2]))
    burst.scale(2)
    assert run.result(timeout=30) == (3,)
    with pytest.raises(ConfigError, match="workers=-1"):
        burst.scale(-1)
