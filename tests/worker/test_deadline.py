"""When a worker asks the store whether the session is over, and what it believes."""

from __future__ import annotations

import pytest
from stage import Stage

from burst_dask.protocol import keys
from burst_dask.protocol.session_records import Attach, Extend, Scale
from burst_dask.store import requests_of
from burst_dask.worker import deadline
from burst_dask.worker.context import Context
from burst_dask.worker.deadline import Deadline

HOUR = 3600.0


class HandClock:
    """A machine's clock that is set by hand."""

    def __init__(self, wall: float) -> None:
        self.passed = 0.0
        self.start = wall

    def monotonic(self) -> float:
        return self.passed

    def wall(self) -> float:
        return self.start + self.passed

    async def sleep(self, seconds: float) -> None:
        raise AssertionError("nothing here waits")


class Case:
    """One worker of a session in a store whose clock is the machine's, off by `wrong` seconds."""

    def __init__(self, context: Context, stage: Stage, wrong: float) -> None:
        self.stage = stage
        self.context = context
        self.clock = HandClock(stage.clock.wall() + wrong)
        context.clock = self.clock
        self.deadline = Deadline(context, self.renew)

    async def renew(self) -> None:
        await self.stage.beat("me")

    async def passed(self) -> tuple[bool, int]:
        """Return what it says, and how many requests that took."""
        before = sum(requests_of(self.stage.store).values())
        said = await self.deadline.passed(self.stage.state)
        return said, sum(requests_of(self.stage.store).values()) - before

    async def over(self) -> bool:
        """Let a moment pass, and tell whether it says that the session is over."""
        while not (await self.passed())[0]:
            assert self.clock.passed < deadline.ASK_EVERY + 60
            self.clock.passed += 1
        return True


async def case(wrong: float = 0.0, **settings: float | None) -> Case:
    stage = await Stage(**settings).open()
    return Case(stage.context(), stage, wrong)


async def test_without_a_limit_it_never_asks() -> None:
    one = await case(session_timeout=None)
    one.clock.passed = 1e9
    assert await one.passed() == (False, 0)


async def test_far_from_the_end_it_asks_once_an_hour() -> None:
    one = await case(session_timeout=100 * HOUR)
    assert await one.passed() == (False, 0)
    one.clock.passed = deadline.ASK_EVERY
    said, requests = await one.passed()
    assert not said and requests == 3  # the dates of the log, a heartbeat and its date
    assert await one.passed() == (False, 0)


@pytest.mark.parametrize("wrong", [-2 * HOUR, 2 * HOUR])
async def test_a_wrong_clock_of_the_machine_ends_nothing(wrong: float) -> None:
    one = await case(wrong=wrong, session_timeout=HOUR)
    one.clock.passed = deadline.ASK_EVERY  # by the machine's clock, which may stand still or run ahead
    assert (await one.passed())[0] is False


async def test_a_machine_whose_clock_is_slow_notices_the_end_within_the_hour() -> None:
    one = await case(wrong=-24 * HOUR, session_timeout=0.001)
    assert await one.passed() == (False, 0)
    one.clock.passed = deadline.ASK_EVERY
    assert await one.over()


async def test_near_the_end_the_store_decides() -> None:
    one = await case(session_timeout=300.0)
    assert await one.passed() == (False, 3)
    one.clock.passed = 299.0
    assert await one.passed() == (False, 0)
    one.clock.passed = 301.0  # by this machine it is over; the store's clock has hardly moved
    assert await one.passed() == (False, 2)


async def test_a_sign_of_a_client_moves_the_end() -> None:
    one = await case(session_timeout=0.001)
    await one.stage.append(Attach("client"))
    assert await one.over()
    await one.stage.append(Scale(3))  # no sign of a client
    assert (await one.passed())[0]
    await one.stage.append(Extend(one.stage.clock.wall() + HOUR))
    assert (await one.passed())[0] is False


async def test_the_log_of_a_session_that_is_being_deleted() -> None:
    one = await case(session_timeout=0.001)
    await one.stage.store.delete([keys.entry(keys.session_log(one.stage.session), 0)])
    assert (await one.passed())[0] is False


async def test_a_long_log_is_dated_by_two_requests() -> None:
    one = await case(session_timeout=1.0)
    for _ in range(1500):
        await one.stage.append(Attach("client"))
    assert one.stage.state.sign == 1500
    assert (await one.passed())[1] == 4


async def test_the_time_of_the_store_is_read_once_an_hour() -> None:
    one = await case(wrong=-2 * HOUR)
    before = sum(requests_of(one.stage.store).values())
    assert abs(await one.deadline.now() - one.stage.clock.wall()) < 60
    one.clock.passed = 100.0
    assert abs(await one.deadline.now() - one.stage.clock.wall() - 100.0) < 60
    assert sum(requests_of(one.stage.store).values()) - before == 2
    one.clock.passed = deadline.ASK_EVERY
    await one.deadline.now()
    assert sum(requests_of(one.stage.store).values()) - before == 4
