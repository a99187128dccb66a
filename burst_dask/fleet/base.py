"""What a fleet is: something that starts and stops the workers of one session."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable


class ProcessLog(NamedTuple):
    """What a worker's processes have written to their standard output and error."""

    #: of the file or the log stream
    name: str
    text: str

    def tells_of(self, worker: str) -> bool:
        """Whether the worker of that id ran there.

        >>> ProcessLog("log", "… worker w7kq2mabcdef started, pid 12").tells_of("w7kq2mabcdef")
        True
        """
        return f"worker {worker} started" in self.text


@runtime_checkable
class Fleet(Protocol):
    """Workers of one session, wherever they run.

    A fleet stops only workers that it, or an earlier client of the same session, has started.
    """

    def reduce(self, workers: int) -> None:
        """Have at most that many; those that end hand over their work. May end all, for others to be started."""

    def alive(self) -> int:
        """Return how many workers run."""

    def stop(self, grace: float = 5.0) -> None:
        """Let the workers hand over within `grace` seconds, then end them; returns when they are gone."""

    def remove(self) -> None:
        """Stop the workers and delete what the fleet has kept, such as logs."""

    def describe(self) -> str:
        """Say in one line what runs and where its logs are."""


@runtime_checkable
class Ensuring(Protocol):
    """A fleet of machines that are there anyway: whoever looks starts what is missing, since too many cost nothing."""

    def ensure(self, workers: int) -> int:
        """Start what is missing to `workers`; return how many that were. It does not wait until they are ready.

        Raises
        ------
        FleetError
            They could not be started; the message says what to do.
        """


@runtime_checkable
class Remote(Protocol):
    """A fleet whose workers run elsewhere and cost, where somebody knows what became of them."""

    def notes(self) -> list[str]:
        """Return what a person should know of the workers, in words: why some have ended or do not come up."""


@runtime_checkable
class Logging(Protocol):
    """A fleet that keeps what the processes of its workers write."""

    def process_logs(self, worker: str | None = None) -> list[ProcessLog]:
        """Return it, oldest first; only where the worker of that id ran, if one is given."""


def opening_line(session: str) -> str:
    """Return what the log of every supervisor of a session begins with: logs of all kinds are found by it.

    >>> opening_line("k3w9x2mq")
    'workers for session k3w9x2mq'
    """
    return f"workers for session {session}"
