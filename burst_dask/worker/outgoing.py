"""Laying out what a holder commits: which results ride in the entry, which go into a segment."""

from __future__ import annotations

from dataclasses import dataclass, field

from burst_dask.config import Settings
from burst_dask.protocol.bitmap import Bitmap
from burst_dask.protocol.frames import BLOB_OVERHEAD, Buffer, seal
from burst_dask.protocol.records import Location, Outcomes
from burst_dask.protocol.shard import Shard
from burst_dask.worker.holding import Finished


@dataclass
class Outgoing:
    """Finished tasks, with their results laid out in one entry and at most one segment."""

    finished: Finished
    inline: list[Buffer] = field(default_factory=list)
    segment: list[Buffer] = field(default_factory=list)
    #: position -> (whether in the segment, start, end)
    places: dict[int, tuple[bool, int, int]] = field(default_factory=dict)
    #: name of the segment, once it is written
    segment_name: str = ""

    @classmethod
    def of(cls, finished: Finished, settings: Settings) -> Outgoing:
        """Lay out the stored results of `finished`."""
        outgoing = cls(finished)
        sizes = {False: 0, True: 0}
        for position, ran in finished.ran.items():
            if ran.body is None:
                continue
            size = BLOB_OVERHEAD + sum(memoryview(part).nbytes for part in ran.body)
            large = size > settings.inline_result or sizes[False] + size > settings.inline_entry
            (outgoing.segment if large else outgoing.inline).extend(seal(ran.body))
            outgoing.places[position] = (large, sizes[large], sizes[large] + size)
            sizes[large] += size
        return outgoing

    def outcomes(self, shard: Shard) -> tuple[Outcomes, tuple[str, ...]]:
        """Return the outcomes, and the names of the objects they add, for `shard`'s next entry.

        What has an outcome by now, from a backup copy, is left out: the first stays (rule 3).
        """
        pending = shard.index.pending
        names: list[str] = []
        numbers: dict[bool, int] = {}
        for large, name in ((False, f"@{shard.next}"), (True, self.segment_name)):
            if self.segment if large else self.inline:
                numbers[large] = len(shard.index.objects) + len(names)
                names.append(name)
        ran = {position: ran for position, ran in self.finished.ran.items() if position in pending}
        upstream = {cause: Bitmap.of(tasks) & pending for cause, tasks in self.finished.upstream.items()}
        upstream = {cause: tasks for cause, tasks in upstream.items() if tasks}
        failed = Bitmap.of(p for p, one in ran.items() if one.failed)
        for tasks in upstream.values():
            failed |= tasks
        return Outcomes(
            done=Bitmap.of(p for p, one in ran.items() if not one.failed),
            failed=failed,
            stored={
                p: Location(numbers[large], start, end) for p, (large, start, end) in self.places.items() if p in ran
            },
            upstream=upstream,
            seconds=sum(one.seconds for one in ran.values()),
            ran=len(ran),
        ), tuple(names)
