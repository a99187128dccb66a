"""Each way in which a store can fail ends as one error that says what to do."""

import contextlib
import re
import resource
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from contract import StillClock, in_loop, listed

from burst_dask.errors import (
    BurstError,
    ConfigError,
    StoreAccessDenied,
    StoreError,
    StoreFull,
    StoreMissing,
    StoreUnavailable,
    StoreUnsuitable,
)
from burst_dask.store import Span, obstore_adapter, open_store, requests_of
from burst_dask.store.translate import brief


class Answering(BaseHTTPRequestHandler):
    """Gives the server's next answer, the last one for ever."""

    protocol_version = "HTTP/1.1"

    def answer(self):
        self.rfile.read(int(self.headers.get("content-length") or 0))
        answers = self.server.answers
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if answer == "hang":
            self.server.released.wait(30)
        if answer in ("hang", "reset"):
            self.close_connection = True
            return
        status, body, *headers = answer
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body.encode())

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer

    def log_message(self, *args):
        pass


@pytest.fixture
def answering(aws_credentials):
    """Start a server that answers as told; return the raw store and the retrying one on it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    server.daemon_threads = True
    server.released = threading.Event()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()

    def stores(*answers):
        server.answers = list(answers)
        whole = open_store(f"s3://bucket/p?endpoint_url=http://127.0.0.1:{server.server_port}", clock=StillClock())
        return whole.inner, whole

    yield stores
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


def xml(code, message="", more=""):
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message>{more}</Error>"


CALLS = {
    "create": lambda store: store.create("k", b"1"),
    "put": lambda store: store.put("k", b"1"),
    "get": lambda store: store.get("k"),
    "ranges": lambda store: store.get_ranges("k", [Span(0, 4)]),
    "list": listed,
    "delete": lambda store: store.delete(["k", "l"]),
}
CASES = [
    ((403, xml("AccessDenied", "Access Denied")), StoreAccessDenied, "AccessDenied: Access Denied.*policy"),
    ((403, xml("SignatureDoesNotMatch")), StoreAccessDenied, "SignatureDoesNotMatch"),
    ((403, ""), StoreAccessDenied, "credentials"),
    ((401, ""), StoreAccessDenied, "credentials"),
    ((400, xml("ExpiredToken", "gone")), StoreAccessDenied, "have expired.*aws sso login"),
    ((400, xml("InvalidToken")), StoreAccessDenied, "InvalidToken"),
    ((404, xml("NoSuchBucket")), StoreMissing, "no such bucket"),
    ((409, xml("ConditionalRequestConflict")), StoreUnavailable, "ConditionalRequestConflict"),
    ((409, xml("OperationAborted")), StoreUnavailable, "OperationAborted"),
    ((429, ""), StoreUnavailable, "status 429"),
    ((400, xml("RequestTimeout")), StoreUnavailable, "RequestTimeout"),
    ((500, xml("InternalError")), StoreUnavailable, "InternalError"),
    ((502, "<html>"), StoreUnavailable, "status 502"),
    ((503, xml("SlowDown", "Please reduce")), StoreUnavailable, "SlowDown: Please reduce"),
    ((504, ""), StoreUnavailable, "status 504"),
    ((501, xml("NotImplemented", "A header")), StoreUnsuitable, "NotImplemented: A header"),
    ((507, xml("XMinioStorageFull")), StoreFull, "no space left"),
    ((400, xml("AuthorizationHeaderMalformed", "", "<Region>eu-west-1</Region>")), ConfigError, "region='eu-west-1'"),
    ((400, xml("AuthorizationHeaderMalformed", "wrong; expecting 'eu-west-1'")), ConfigError, "region='eu-west-1'"),
    ((301, xml("PermanentRedirect")), ConfigError, "another region.*head-bucket"),
    ((400, xml("MalformedXML", "bad")), StoreError, "MalformedXML: bad"),
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("answer", "kind", "says"), CASES)
@in_loop
async def test_answers_of_a_service(answering, answer, kind, says, call):
    store, _ = answering(answer)
    with pytest.raises(BurstError, match=says) as caught:
        await CALLS[call](store)
    assert type(caught.value) is kind
    assert "s3://bucket/p" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("call", CALLS)
@in_loop
async def test_lost_connection(answering, call):
    store, _ = answering("reset")
    with pytest.raises(StoreUnavailable, match="unavailable"):
        await CALLS[call](store)


@pytest.mark.parametrize("call", CALLS)
@in_loop
async def test_no_answer(answering, call, monkeypatch):
    monkeypatch.setattr(obstore_adapter, "_ANSWER_SECONDS", 0.1)
    store, _ = answering("hang")
    with pytest.raises(StoreUnavailable, match="did not answer within"):
        await CALLS[call](store)


@in_loop
async def test_nobody_listens(aws_credentials):
    store = open_store("s3://bucket/p?endpoint_url=http://127.0.0.1:9", clock=StillClock())
    with pytest.raises(StoreUnavailable, match=r"Connection refused.*tried 10 times"):
        await store.get("k")


OK = (200, "", ("etag", '"1"'))
EXISTS = (412, xml("PreconditionFailed"))


@pytest.mark.parametrize(
    "hiccup", [(409, xml("ConditionalRequestConflict")), (503, xml("SlowDown")), (500, ""), "reset"]
)
@in_loop
async def test_hiccups_are_retried(answering, hiccup):
    _, store = answering(hiccup, hiccup, OK)
    assert await store.create("k", b"1")
    assert requests_of(store)["create"] == 3


@pytest.mark.parametrize("hiccup", [(409, xml("ConditionalRequestConflict")), (500, ""), "reset"])
@pytest.mark.parametrize(("there", "won"), [("nonce 1", True), ("nonce 2", False)])
@in_loop
async def test_exists_after_a_hiccup_is_settled_by_reading_back(answering, hiccup, there, won):
    date = ("last-modified", "Tue, 24 Nov 2026 06:00:00 GMT")
    _, store = answering(hiccup, EXISTS, (200, there, ("etag", '"1"'), date))
    assert await store.create("k", b"nonce 1") is won


@in_loop
async def test_exists_at_once_is_a_loss(answering):
    _, store = answering(EXISTS)
    assert not await store.create("k", b"1")
    assert requests_of(store) == {"create": 1, "put": 0, "get": 0, "list": 0, "delete": 0}


@in_loop
async def test_absent_bucket_is_not_an_absent_object(moto_server):
    store = open_store(f"s3://never-created/p?endpoint_url={moto_server}")
    for call in CALLS.values():
        with pytest.raises(StoreMissing, match="no such bucket"):
            await call(store)


def test_query_of_a_signed_url_is_not_shown():
    assert (
        brief("Error performing GET https://h/c/k?sig=hunter2 in 1ms - x")
        == "Error performing GET https://h/c/k in 1ms - x"
    )


@in_loop
async def test_file_larger_than_allowed_is_a_full_store(tmp_path):
    """The limit on a file's size fails a write half-way, as a full disk or a quota does."""
    store = open_store(tmp_path)
    await store.put("before", b"kept")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        for call in (store.put("k", bytes(1 << 20)), store.create("l", bytes(1 << 20))):
            with pytest.raises(StoreFull, match=re.escape(str(tmp_path))):
                await call
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert await listed(store) == ["before"]
    assert [path.name for path in tmp_path.iterdir()] == ["before"]  # no half of a file is left either


FULL_DISK = """
import asyncio, subprocess, sys
from burst_dask.errors import StoreAccessDenied, StoreFull
from burst_dask.store import open_store

async def main(path):
    store = open_store(path)
    await store.put("before", b"kept")
    try:
        for number in range(100):
            await store.create(f"k/{number}", bytes(16_384))
    except StoreFull as error:
        print(error)
    assert await store.get("before") == b"kept"
    subprocess.run(["mount", "-o", "remount,ro", path], check=True)
    try:
        await store.put("before", b"changed")
    except StoreAccessDenied as error:
        print(error)

asyncio.run(main(sys.argv[1]))
"""


def may_mount():
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/tmp"]
    return shutil.which("unshare") and subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not may_mount(), reason="no user namespace may be created here")
def test_full_disk_and_read_only_disk(tmp_path):
    shell = f'mount -t tmpfs -o size=256k tmpfs "{tmp_path}" && exec "$0" -c "$1" "{tmp_path}"'
    command = ["unshare", "-rm", "sh", "-c", shell, sys.executable, FULL_DISK]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    full, read_only = done.stdout.splitlines()
    assert "no space left" in full
    assert "os error 30" in read_only


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="no directory that nobody may write to")
def test_directory_that_cannot_be_created():
    with pytest.raises(StoreAccessDenied, match="/sys/kernel/store"):
        open_store("/sys/kernel/store")


@in_loop
async def test_directory_that_vanished_is_missing(tmp_path):
    store = open_store(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with contextlib.suppress(StoreMissing):
        assert await listed(store) == []
    assert await store.get("k") is None
