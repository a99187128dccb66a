"""What a fleet is: something that starts and stops the workers of one session."""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class Fleet(Protocol):
    """Workers of one session, wherever they run.

    A fleet stops only workers that it, or an earlier client of the same session, has started.
    """

    def start(self, count: int) -> None:
        """Start `count` workers and return without waiting until they are ready.

        Raises
        ------
        FleetError
            They could not be started; the message says what to do.
        """

    def ensure(self, workers: int) -> int:
        """Start what is missing to `workers`; return how many that were."""

    def alive(self) -> int:
        """Return how many workers run."""

    def stop(self, grace: float = 5.0) -> None:
        """Let the workers hand over within `grace` seconds, then end them; returns when they are gone."""

    def remove(self) -> None:
        """Stop the workers and delete what the fleet has kept, such as logs."""

    def describe(self) -> str:
        """Say in one line what runs and where its logs are."""
