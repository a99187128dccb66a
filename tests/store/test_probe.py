"""The probe refuses stores that break a promise, by name and with the reason."""

import pytest
from contract import Once, StillClock, in_loop, listed

from burst_dask.clock import Entropy
from burst_dask.errors import StoreUnsuitable
from burst_dask.store import Fault, Faulty, Retrying, open_store, probe


@in_loop
async def test_a_server_that_ignores_conditional_headers_is_refused(rclone_server):
    import boto3

    boto3.client("s3", endpoint_url=rclone_server, region_name="us-east-1").create_bucket(Bucket="probed")
    store = open_store(f"s3://probed/p?endpoint_url={rclone_server}")
    for _ in range(2):  # it is not remembered as a good one
        with pytest.raises(StoreUnsuitable, match=r"s3://probed/p.*8 were told.*If-None-Match"):
            await probe(store, Entropy())
    assert "probe-v1" not in await listed(store)


class Breaking:
    """A memory store that breaks one promise."""

    def __init__(self):
        self.inner = open_store(f"memory://{Entropy().token()}")

    def __getattr__(self, name):
        return getattr(self.inner, name)


class AlwaysCreates(Breaking):
    async def create(self, key, body):
        await self.inner.put(key, body)
        return True


class ForgetsLater(Breaking):
    """Its racers are told right, but a later create replaces what is there."""

    calls = 0

    async def create(self, key, body):
        self.calls += 1
        return await self.inner.create(key, body) if self.calls <= 8 else True


class KeepsTheLast(Breaking):
    async def create(self, key, body):
        won = await self.inner.create(key, body)
        await self.inner.put(key, body)
        return won


class ListsLate(Breaking):
    async def list(self, prefix, *, after=""):
        return
        yield


class ListsFromTheStart(Breaking):
    def list(self, prefix, *, after=""):
        return self.inner.list(prefix)


class IgnoresRanges(Breaking):
    async def get_ranges(self, key, spans):
        return [memoryview(await self.inner.get(key))]


class KeepsDeleted(Breaking):
    async def delete(self, keys):
        pass


@pytest.mark.parametrize(
    ("store", "reason"),
    [
        (AlwaysCreates, "8 were told"),
        (ForgetsLater, "created an object that existed"),
        (KeepsTheLast, "does not hold what"),
        (ListsLate, "listing does not show"),
        (ListsFromTheStart, "still shows that key"),
        (IgnoresRanges, "range"),
        (KeepsDeleted, "after it was deleted"),
    ],
)
@in_loop
async def test_each_broken_promise_is_named(store, reason):
    broken = store()
    with pytest.raises(StoreUnsuitable, match=reason) as caught:
        await probe(broken, Entropy(1))
    assert str(caught.value).startswith(broken.url)
    assert await broken.inner.get("probe-v1") is None


@pytest.mark.parametrize("verb", ["put", "create", "get", "list", "delete"])
@in_loop
async def test_a_lost_answer_is_no_broken_promise(verb):
    store = Retrying(Faulty(Breaking().inner, Once(verb, Fault.LOST)), StillClock(), Entropy(1))
    await probe(store, Entropy(1))
    assert await listed(store) == ["probe-v1"]
