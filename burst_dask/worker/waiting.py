"""What all parts of a worker use: its log, and waiting for something to happen."""

from __future__ import annotations

import asyncio
import logging

logger = logging.getLogger("burst_dask.worker")


async def wait_for(event: asyncio.Event, seconds: float | None) -> bool:
    """Wait until `event` is set, at most `seconds`; clear it, and tell whether it was."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    event.clear()
    return True
