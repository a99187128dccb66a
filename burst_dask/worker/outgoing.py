"""Laying out what a holder commits: which results ride in the entry, which go into a segment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from burst_dask.config import Settings
from burst_dask.protocol.bitmap import Bitmap
from burst_dask.protocol.frames import Buffer, seal
from burst_dask.protocol.records import Location, Outcomes
from burst_dask.protocol.shard import Shard
from burst_dask.worker.ran import Finished


@dataclass
class Outgoing:
    """Finished tasks, with their results laid out in one entry and at most one segment."""

    finished: Finished
    #: position -> small result that rides in the entry, as a sealed blob
    inline: dict[int, bytes] = field(default_factory=dict)
    #: those of them that rode in the entry before, too
    carried: frozenset[int] = frozenset()
    #: those that were only in memory so far
    kept: frozenset[int] = frozenset()
    #: large results, one after another
    segment: list[Buffer] = field(default_factory=list)
    #: position -> whether in the segment, start, end
    places: dict[int, tuple[bool, int, int]] = field(default_factory=dict)
    #: names of the segment, and of the object with what tasks have printed, once they are written
    segment_name: str = ""
    logs_name: str = ""

    @classmethod
    def of(
        cls,
        finished: Finished,
        carried: Mapping[int, bytes],
        settings: Settings,
        kept: Mapping[int, list[Buffer]] | None = None,
    ) -> Outgoing:
        """Lay out the stored results of `finished`.

        Parameters
        ----------
        kept
            Results by position that so far were only in memory, of any tasks that are done.
        carried
            Small results of the entry before. While all of them fit, they ride in this entry
            too: so the newest entry has them all, and who collects them reads one object.
        """
        bodies = {position: ran.body for position, ran in finished.ran.items() if ran.body is not None} | dict(
            kept or {}
        )
        outgoing = cls(finished, kept=frozenset(kept or ()))
        small: dict[int, bytes] = {}
        end = small_size = 0
        for position, body in bodies.items():
            blob = seal(body)
            size = sum(memoryview(part).nbytes for part in blob)
            if size <= settings.inline_result and small_size + size <= settings.inline_entry:
                small[position] = b"".join(blob)
                small_size += size
            else:
                outgoing.segment.extend(blob)
                outgoing.places[position] = (True, end, end + size)
                end += size
        if sum(map(len, carried.values())) + small_size <= settings.inline_entry:
            outgoing.carried = frozenset(carried)
            small = {**carried, **small}
        outgoing.inline = small
        end = 0
        for position, data in outgoing.inline.items():
            outgoing.places[position] = (False, end, end + len(data))
            end += len(data)
        return outgoing

    @property
    def blobs(self) -> list[bytes]:
        """What follows the entry."""
        return list(self.inline.values())

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
        logged = Bitmap.of(output.position for output in self.finished.outputs) & shard.index.tasks
        failed = Bitmap.of(p for p, one in ran.items() if one.failed)
        for tasks in upstream.values():
            failed |= tasks
        return Outcomes(
            done=Bitmap.of(p for p, one in ran.items() if not one.failed),
            failed=failed,
            stored={
                p: Location(numbers[large], start, end)
                for p, (large, start, end) in self.places.items()
                if p in ran or p in self.carried or p in self.kept
            },
            upstream=upstream,
            seconds=sum(one.seconds for one in ran.values()),
            ran=sum(not one.cancelled for one in ran.values()),
            logs={self.logs_name: logged} if self.logs_name else {},
            tries={p: tries for p, tries in self.finished.tries.items() if p in pending},
            cancelled=Bitmap.of(self.finished.cancelled) & failed,
        ), tuple(names)
