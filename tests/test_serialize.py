"""Objects come back from bytes as they were, and failures as they were raised."""

from __future__ import annotations

import traceback
from collections import deque
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from dask._task_spec import Task, TaskRef
from hypothesis import given
from hypothesis import strategies as st

from burst_dask import serialize
from burst_dask.errors import RemoteTaskError, WorkerLost


def body(value: Any) -> bytes:
    return b"".join(serialize.dumps(value))


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
)


@given(plain)
def test_plain_objects_come_back(value: Any) -> None:
    assert serialize.loads(body(value)) == value
    assert serialize.loads(memoryview(body(value))) == value


@given(st.lists(st.integers(0, 20_000), max_size=5), st.booleans())
def test_arrays_come_back_and_keep_whether_they_are_writeable(lengths: list[int], writeable: bool) -> None:
    arrays = [np.arange(length, dtype="u2") for length in lengths]
    for array in arrays:
        array.flags.writeable = writeable
    for data in (body(arrays), bytearray(body(arrays))):
        for array, loaded in zip(arrays, serialize.loads(data), strict=True):
            np.testing.assert_array_equal(loaded, array)
            if array.nbytes >= serialize.OUT_OF_BAND_FROM:
                assert loaded.flags.writeable == writeable


def test_a_writeable_body_is_used_in_place_and_a_read_only_one_is_not_pinned() -> None:
    data = bytearray(body(np.zeros(10_000)))
    array = serialize.loads(data)
    array[:] = 7
    assert serialize.loads(bytes(data))[0] == 7
    with pytest.raises(BufferError):
        data.append(0)  # the array lies in it
    free = bytes(data)
    assert not np.shares_memory(serialize.loads(free), np.frombuffer(free, "u1"))


def test_frames_and_tables_come_back() -> None:
    frame = pd.DataFrame({"a": np.arange(5000), "b": [str(i) for i in range(5000)]})
    loaded = serialize.loads(body(frame))
    pd.testing.assert_frame_equal(loaded, frame)
    loaded.loc[0, "a"] = 7
    table = pa.table({"a": np.arange(5000), "b": [str(i) for i in range(5000)]})
    assert serialize.loads(body(table)) == table


def test_what_plain_pickle_cannot_write_comes_back() -> None:
    offset = 3
    assert serialize.loads(body(lambda x: x + offset))(4) == 7


def test_what_main_defines_goes_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    space: dict[str, Any] = {"__name__": "__main__"}
    exec("class Here:\n    x = 5", space)  # as a notebook does
    monkeypatch.setattr(sys.modules["__main__"], "Here", space["Here"], raising=False)
    data = body(space["Here"]())
    monkeypatch.delattr(sys.modules["__main__"], "Here")
    assert serialize.loads(data).x == 5


def test_tasks_of_a_payload_share_what_they_have_in_common() -> None:
    array, large = np.arange(30_000), ["text"] * 10
    nodes = [Task(i, max, TaskRef(i - 1), array, large) for i in range(3)]
    placed: list[bytes] = []

    def place(view: memoryview) -> int:
        placed.append(bytes(view))
        return len(placed) - 1

    def share(item: Any) -> int | None:
        if item is not large:
            return None
        if body(item) not in placed:
            placed.append(body(item))
        return placed.index(body(item))

    payload = serialize.dump_payload(nodes, place, share)
    assert len(payload) < 1000
    assert len(placed) == 2
    loaded = serialize.load_payload(payload, [memoryview(data) for data in placed])
    assert [node.dependencies for node in loaded] == [node.dependencies for node in nodes]
    assert loaded[0].args[1] is loaded[2].args[1]
    assert loaded[0].args[2] is loaded[2].args[2]
    assert loaded[0].args[2] == large
    loaded[0].args[1][0] = 1
    in_band = serialize.dump_payload(nodes, lambda view: None)
    np.testing.assert_array_equal(serialize.load_payload(in_band, [])[0].args[1], array)


# ---------------------------------------------------------------------------- failures


def carry(error: BaseException) -> serialize.Failure:
    (data,) = serialize.dump_failure(error, key=("x", 1), worker="w1", attempts=2)
    return serialize.load_failure(memoryview(data))


def caught(function: Any) -> BaseException:
    try:
        function()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


class TwoArguments(Exception):
    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"code {code}: {text}")
        self.code = code


class Prefixing(ValueError):
    def __init__(self, code: Any) -> None:
        super().__init__(f"code {code}")


class HoldsGenerator(Exception):
    def __init__(self) -> None:
        super().__init__("holds one", (i for i in range(3)))
        self.generator = (i for i in range(3))
        self.code = 5


class NeverLoads(Exception):
    def __reduce__(self) -> Any:
        return _explode, ()


class NoText(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def _explode() -> None:
    raise RuntimeError("unpickling it raises")


def fail() -> None:
    deep()


def deep() -> None:
    raise KeyError("missing")


def test_an_exception_comes_back_with_its_traceback() -> None:
    failure = carry(caught(fail))
    assert (failure.key, failure.worker, failure.attempts) == (("x", 1), "w1", 2)
    assert failure.traceback.endswith("KeyError: 'missing'\n")
    for _ in range(2):  # raising it again shows the same
        with pytest.raises(KeyError) as again:
            failure.reraise()
        names = [frame.name for frame in traceback.extract_tb(again.value.__traceback__)]
        assert names[-3:] == ["caught", "fail", "deep"]
        assert names.count("reraise") == 1


def test_frames_that_lead_to_the_task_are_dropped() -> None:
    node = Task("x", fail)
    failure = carry(caught(lambda: node({})))
    names = [frame.name for frame in traceback.extract_tb(failure.remote)]
    assert names[:2] == ["caught", "<lambda>"]
    error = caught(lambda: node({}))
    assert error.__traceback__ is not None
    task_spec = error.__traceback__.tb_next.tb_next  # type: ignore[union-attr]
    names = [frame.name for frame in traceback.extract_tb(carry(error.with_traceback(task_spec)).remote)]
    assert names == ["fail", "deep"]


def test_causes_contexts_and_notes_come_back() -> None:
    def chain() -> None:
        try:
            try:
                deep()
            except KeyError as error:
                raise TwoArguments(3, "text") from error
        except TwoArguments as error:
            error.add_note("while chaining")
            raise ValueError("last")  # noqa: B904

    error = carry(caught(chain)).exception
    assert type(error) is ValueError
    assert type(error.__context__) is TwoArguments
    assert error.__context__.__notes__ == ["while chaining"]
    assert error.__context__.__suppress_context__
    assert type(error.__context__.__cause__) is KeyError
    assert error.__context__.__cause__.__traceback__ is not None


def test_a_cycle_of_contexts_ends() -> None:
    first, second = ValueError(1), ValueError(2)
    first.__context__, second.__context__ = second, first
    assert str(carry(first).exception.__context__) == "2"


def test_a_long_chain_is_cut() -> None:
    error: BaseException = ValueError(0)
    for i in range(1, 1000):
        error, error.__context__ = ValueError(i), error
    assert str(carry(error).exception) == "999"


def test_the_traceback_of_a_recursion_is_cut() -> None:
    def recurse() -> None:
        recurse()

    failure = carry(caught(recurse))
    assert type(failure.exception) is RecursionError
    assert len(traceback.extract_tb(failure.remote)) == 100


def test_exception_groups_come_back() -> None:
    group = carry(ExceptionGroup("both", [caught(fail), Prefixing(5)])).exception
    assert isinstance(group, ExceptionGroup)
    assert [type(error) for error in group.exceptions] == [KeyError, Prefixing]
    assert group.exceptions[0].__traceback__ is not None


@pytest.mark.parametrize(
    "error",
    [
        TwoArguments(3, "text"),
        Prefixing(5),
        FileNotFoundError(2, "No such file", "name"),
        UnicodeDecodeError("utf-8", b"x", 0, 1, "reason"),
        ImportError("no", name="mod"),
        StopIteration(3),
        SystemExit(4),
        KeyboardInterrupt(),
        WorkerLost("three workers died"),
        pd.errors.ParserError("pandas"),
        ValueError("\udce9 is no UTF-8", np.int64(3)),
    ],
)
def test_exceptions_of_all_sorts_come_back(error: BaseException) -> None:
    found = carry(error).exception
    assert type(found) is type(error)
    assert str(found) == str(error)
    assert found.args == error.args
    assert found.__dict__ == error.__dict__


def test_what_cannot_be_pickled_in_an_exception_is_left_out() -> None:
    error = carry(HoldsGenerator()).exception
    assert isinstance(error, HoldsGenerator)
    assert error.code == 5
    assert not hasattr(error, "generator")
    assert error.args[0] == "holds one"
    assert "generator object" in error.args[1]


def test_an_exception_of_a_class_that_is_not_there_is_stood_in_for(monkeypatch: pytest.MonkeyPatch) -> None:
    (data,) = serialize.dump_failure(Prefixing(5), key="x", worker="w", attempts=1)
    monkeypatch.delattr(f"{__name__}.Prefixing")
    error = serialize.load_failure(data).exception
    assert isinstance(error, RemoteTaskError)
    assert "Prefixing: code 5" in str(error)
    assert "cannot be unpickled here (AttributeError" in str(error)


def test_an_exception_that_cannot_be_loaded_is_made_without_its_reduce() -> None:
    assert type(carry(NeverLoads("text")).exception) is NeverLoads


def test_an_exception_without_text() -> None:
    failure = carry(NoText())
    assert type(failure.exception) is NoText
    assert "NoText" in failure.traceback


def test_a_key_that_cannot_be_pickled_is_named() -> None:
    (data,) = serialize.dump_failure(ValueError(), key=(i for i in deque()), worker="w", attempts=1)
    assert "generator" in serialize.load_failure(data).key
