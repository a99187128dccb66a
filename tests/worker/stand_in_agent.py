"""Stands in for an agent process: does what STAND_IN says, and leaves a file when it is up.

With ``STAND_IN="crash sleep"`` the first one crashes and the second sleeps; the last word
holds for all that follow.
"""

import argparse
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path


def behaviour(directory: Path, worker: str) -> str:
    words = os.environ.get("STAND_IN", "sleep").split()
    for turn in range(1000):
        try:
            (directory / f"turn-{turn}").touch(exist_ok=False)
        except FileExistsError:
            continue
        return words[min(turn, len(words) - 1)]
    raise AssertionError


def main() -> int:
    parser = argparse.ArgumentParser()
    for name in ("session", "store", "worker", "threads", "memory-limit", "spill-directory", "supervisor-fd"):
        parser.add_argument(f"--{name}", required=True)
    options = parser.parse_args()
    directory = Path(os.environ["STAND_IN_DIRECTORY"])
    what = behaviour(directory, options.worker)
    signal.signal(signal.SIGTERM, signal.SIG_IGN if what in ("stubborn", "deaf") else lambda *_: os._exit(0))
    Path(options.spill_directory, "spilled").touch()
    if what == "crash":
        print("Traceback: whatever\nOSError: the dog ate it", file=sys.stderr)
        return 1
    if what == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "refuse":
        return 3
    if what == "restart":
        return 4
    if what == "end":
        return 0
    if what == "lost":
        return 4
    eaten = bytearray(b"x" * 150_000_000) if what == "eat" else b""
    if what == "parent":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (directory / "child").write_text(str(child.pid))
    (directory / f"{options.worker}.tmp").write_text(str(os.getpid()))
    (directory / f"{options.worker}.tmp").rename(directory / f"{options.worker}.up")
    while not select.select([int(options.supervisor_fd)], [], [], 600)[0] or what == "deaf":
        time.sleep(0.1)
    return len(eaten) and 9


if __name__ == "__main__":
    sys.exit(main())
