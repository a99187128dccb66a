"""Slow reads are sent once more, and whichever answer comes first counts."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

from burst_dask.clock import Entropy
from burst_dask.errors import StoreUnavailable
from burst_dask.store import Hedging, open_store
from burst_dask.testing.loop import VirtualLoop


class Slow:
    """A store whose reads take the times given, one after another."""

    def __init__(self, *seconds: float, fails: int = 0) -> None:
        self.inner = open_store(f"memory://{Entropy().token()}")
        self.seconds = list(seconds)
        self.sent = 0
        #: number of the read that fails, from 1
        self.fails = fails

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def get(self, key: str) -> bytes | None:
        self.sent += 1
        number, seconds = self.sent, self.seconds.pop(0)
        await asyncio.sleep(seconds)
        if number == self.fails:
            raise StoreUnavailable("too late")
        return f"{key} after {seconds:g}".encode()

    async def list(self, prefix: str, *, after: str = "") -> Any:
        self.sent += 1
        await asyncio.sleep(self.seconds.pop(0))
        names = [f"{prefix}{number:04d}" for number in range(1500)]
        page = [name for name in names if name > after][:1000]
        if page:
            yield [type("Meta", (), {"key": name})() for name in page]


def timed(coroutine: Any) -> tuple[Any, float]:
    loop = VirtualLoop()
    return loop.run_until_complete(coroutine), round(loop.time(), 2)


def test_a_quick_read_is_sent_once() -> None:
    slow = Slow(0.1)
    assert timed(Hedging(slow).get("k")) == (b"k after 0.1", 0.1)
    assert slow.sent == 1


def test_a_slow_read_is_sent_again_and_the_first_answer_counts() -> None:
    slow = Slow(3.0, 0.1)
    assert timed(Hedging(slow, after=0.5).get("k")) == (b"k after 0.1", 0.6)
    assert slow.sent == 2
    slow = Slow(0.7, 3.0)
    assert timed(Hedging(slow, after=0.5).get("k")) == (b"k after 0.7", 0.7)


def test_an_error_that_comes_first_is_the_answer() -> None:
    async def read() -> str:
        try:
            await Hedging(Slow(60.0, 99.0, fails=1), after=0.5).get("k")
        except StoreUnavailable as error:
            return str(error)
        return ""

    assert timed(read()) == ("too late", 60.0)


def test_each_page_of_a_listing_is_hedged_and_none_is_lost() -> None:
    slow = Slow(3.0, 0.1, 0.1)

    async def read() -> list[str]:
        return [meta.key async for page in Hedging(slow, after=0.5).list("p/") for meta in page]

    names, took = timed(read())
    assert len(names) == len(set(names)) == 1500 and names == sorted(names)
    assert took == 0.7 and slow.sent == 3


async def test_a_caller_that_gives_up_leaves_nothing_running() -> None:
    before = asyncio.all_tasks()
    try:
        async with asyncio.timeout(0.01):
            await Hedging(Slow(30.0), after=20.0).get("k")
    except TimeoutError:
        pass
    assert asyncio.all_tasks() == before


def test_of_two_answers_at_once_none_is_left_unlooked_at(monkeypatch) -> None:
    """The event loop would print that of an error."""
    complaints: list[Any] = []
    monkeypatch.setattr(VirtualLoop, "call_exception_handler", lambda loop, context: complaints.append(context))

    async def read() -> bytes | None:
        return await Hedging(Slow(0.75, 0.25, fails=2), after=0.5).get("k")

    assert timed(read()) == (b"k after 0.75", 0.75)
    gc.collect()
    assert complaints == []
