"""Checks the model of the shard log with spin; prints what it found as a table.

``python model/check.py`` needs ``spin`` and a C compiler. The test suite runs the same checks.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

MODEL = Path(__file__).with_name("shard_log.pml")
#: Megabytes that a search may take. One that needs more is reported as incomplete.
MEMORY = 3000
#: Steps to which a search may go down; one that would go deeper is reported as incomplete.
DEPTH = 100_000


class Check(NamedTuple):
    """One search: the model with some bounds, and perhaps with a fault built in."""

    name: str
    flags: str
    #: what spin is to report of a fault: part of the violated assertion, or the kind of violation
    finds: str = ""
    #: whether the temporal property is searched for, rather than assertions and dead ends
    liveness: bool = False


class Finding(NamedTuple):
    """What a search has found."""

    errors: int
    #: why the search was not complete; empty when each reachable state was visited
    incomplete: str
    #: what is violated; empty when nothing is
    violated: str
    states: int
    depth: int
    seconds: float


#: No search may find anything. Together they have each kind of entry with each kind of fault.
CONFIGURATIONS = [
    Check("faults", "-DCRASHES=2 -DALARMS=1 -DSILENCES=1"),
    Check("alarms", "-DALARMS=2"),
    Check("handover", "-DALARMS=1 -DRELEASES=1"),
    Check("handover-faults", "-DRELEASES=1 -DCRASHES=1 -DSILENCES=1 -DWORKERS=2"),
    Check("three-tasks", "-DTASKS=3 -DALARMS=1"),
    Check("backup", "-DBACKUPS=1 -DCRASHES=1 -DALARMS=1"),
    Check("backup-silence", "-DBACKUPS=1 -DCRASHES=1 -DSILENCES=1"),
    Check("split", "-DSPLITS=1 -DTASKS=3"),
    Check("split-crash", "-DSPLITS=1 -DCRASHES=1"),
    Check("split-faults", "-DSPLITS=1 -DTASKS=3 -DCRASHES=1 -DALARMS=1 -DWORKERS=2"),
    Check("split-silence", "-DSPLITS=1 -DTASKS=3 -DCRASHES=1 -DSILENCES=1 -DWORKERS=2"),
    Check("discard", "-DDISCARDS=1 -DBACKUPS=1 -DALARMS=1"),
    Check("discard-split", "-DDISCARDS=1 -DSPLITS=1 -DCRASHES=1"),
    Check("discard-silence", "-DDISCARDS=2 -DALARMS=1 -DRELEASES=1 -DSILENCES=1 -DWORKERS=2"),
    Check("liveness", "-DCRASHES=1 -DSILENCES=1", liveness=True),
]

#: Each breaks one rule, and must be found: so the checks can fail.
MUTATIONS = [
    Check("OVERWRITE", "", "log[s].e[n].kind==0"),
    Check("NO_FENCING", "-DALARMS=1", "attempt.writer==log[s].e[(n-1)].holder"),
    Check("KEEP_FENCED_WORK", "-DALARMS=1 -DRELEASES=1", "attempt.since==tenure[s]"),
    Check("TWO_TENDERS", "-DALARMS=1 -DRELEASES=1", "attempt.since==tenure[s]"),
    Check("ENTRY_BEFORE_SEGMENT", "", "durable"),
    Check("IGNORE_DEPENDENCIES", "", "attempt.done|log[0].e[(log[0].length-1)].done)&1"),
    Check("NO_UPSTREAM_FAILURE", "", "==((1<<2)-1)"),
    Check("NO_UPSTREAM_FAILURE", "", "acceptance cycle", liveness=True),
    Check("NO_READBACK", "-DSILENCES=1", "nonce!=w"),
    Check("SILENCE_IS_LOSS", "-DSILENCES=1", "nonce!=w"),
    Check("SILENCE_IS_WIN", "-DSILENCES=1", "nonce==w"),
    Check("START_UNRESERVED", "-DSPLITS=1", "reserved"),
    Check("START_GIVEN_BACK", "-DTASKS=3", "reserved"),
    Check("DISCARD_EARLY", "-DDISCARDS=1 -DSPLITS=1", "gone==log[s].e[(n-1)].gone"),
    Check("KEEP_BUILT_ON_BEATEN", "-DBACKUPS=1", "attempt.failed|log[0].e[(log[0].length-1)].failed)&1"),
]


def missing() -> str:
    """Return what the checks need and this machine lacks, in words; empty when it has all."""
    if shutil.which("spin") is None:
        return "spin is not installed (Debian, Ubuntu: apt-get install spin)"
    return "" if shutil.which("gcc") else "gcc is not installed"


def search(check: Check, folder: Path, *, mutation: bool = False) -> Finding:
    """Generate, compile and run one search; its files go into `folder`.

    Raises
    ------
    RuntimeError
        spin or the compiler refuses the model; the message has their output.
    """
    flags = check.flags.split() + ([f"-D{check.name}"] if mutation else [])
    if check.liveness:
        flags.append("-DLIVENESS")
    _run(["spin", "-a", *flags, str(MODEL)], folder)
    kind = ["-DNFAIR=4"] if check.liveness else ["-DSAFETY"]
    # -O2 would take longer to compile than it saves.
    # All processes share all variables, so partial order reduction finds nothing to leave out.
    shape = ["-DCOLLAPSE", "-DNOREDUCE", "-DVECTORSZ=8192", f"-DMEMLIM={MEMORY}"]
    _run(["gcc", "-O0" if mutation else "-O1", "-w", *kind, *shape, "-o", "pan", "pan.c"], folder)
    # -A: a fault is to be found as a cycle, not by an assertion on the way.
    how = ["-a", "-f", *(["-A"] if mutation else [])] if check.liveness else []
    return _read(_run(["./pan", f"-m{DEPTH}", *how], folder, ok=None))


def _run(command: list[str], folder: Path, ok: int | None = 0) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    if ok is not None and (done.returncode != ok or "rror:" in output):
        raise RuntimeError(f"{' '.join(command)} failed:\n{output}")
    return output


def _read(output: str) -> Finding:
    counted = re.search(r"depth reached (\d+), errors: (\d+)\s+(\d+) states, stored", output)
    if counted is None:
        raise RuntimeError(f"no counts in what the search printed:\n{output}")
    stops = ("max search depth too small", "Search not completed", "out of memory", "reached -DMEMLIM", "aborting")
    violated = re.search(r"^pan:1: (.*)", output, re.MULTILINE)
    elapsed = re.search(r"elapsed time ([\d.e+-]+) seconds", output)
    return Finding(
        errors=int(counted[2]),
        incomplete=", ".join(stop for stop in stops if stop in output),
        violated=violated[1].strip() if violated else "",
        states=int(counted[3]),
        depth=int(counted[1]),
        seconds=float(elapsed[1]) if elapsed else 0.0,
    )


def search_all(checks: Sequence[Check], *, mutation: bool = False) -> list[Finding]:
    """Run searches, two at once."""

    def one(check: Check) -> Finding:
        with tempfile.TemporaryDirectory() as folder:
            return search(check, Path(folder), mutation=mutation)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, checks))


def main() -> int:
    if lack := missing():
        sys.stderr.write(f"cannot check the model: {lack}\n")
        return 2
    wrong = 0
    for checks, mutation in ((CONFIGURATIONS, False), (MUTATIONS, True)):
        for check, found in zip(checks, search_all(checks, mutation=mutation), strict=True):
            if mutation:
                good = found.errors > 0 and check.finds in found.violated
            else:
                good = not found.errors and not found.incomplete
            wrong += not good
            verdict = ("found" if mutation else "holds") if good else f"WRONG: {found}"
            figures = f"{found.states:,} | {found.depth} | {found.seconds:.1f}"
            sys.stdout.write(f"| {check.name} | `{check.flags}` | {figures} | {verdict} |\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
