"""Laying out what a holder commits: which results ride in the entry, which go into a segment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from burst_dask.config import Settings
from burst_dask.protocol.bitmap import EMPTY, Bitmap
from burst_dask.protocol.frames import Buffer, seal
from burst_dask.protocol.records import Location, Outcomes
from burst_dask.protocol.shard import Shard
from burst_dask.worker.ran import Finished


class Kind(Enum):
    """Where a result is laid out."""

    INLINE = "in the entry"
    SEGMENT = "in a segment"
    LASTING = "in a segment whose results were asked for, or are errors"


@dataclass
class Outgoing:
    """Finished tasks, with their results laid out in one entry and at most two segments."""

    finished: Finished
    #: position -> small result that rides in the entry, as a sealed blob
    inline: dict[int, bytes] = field(default_factory=dict)
    #: those of them that rode in the entry before, too
    carried: frozenset[int] = frozenset()
    #: those that were only in memory so far
    kept: frozenset[int] = frozenset()
    #: large results, one after another …
    segment: list[Buffer] = field(default_factory=list)
    #: … and those that stay: a segment is deleted as a whole
    lasting: list[Buffer] = field(default_factory=list)
    #: position -> in which of these, start, end
    places: dict[int, tuple[Kind, int, int]] = field(default_factory=dict)
    #: names of the segments, and of the object with what tasks have printed, once they are written
    segment_name: str = ""
    lasting_name: str = ""
    logs_name: str = ""

    @classmethod
    def of(
        cls,
        finished: Finished,
        carried: Mapping[int, bytes],
        settings: Settings,
        kept: Mapping[int, list[Buffer]] | None = None,
        outputs: Bitmap = EMPTY,
    ) -> Outgoing:
        """Lay out the stored results of `finished`.

        Parameters
        ----------
        kept
            Results by position that so far were only in memory, of any tasks that are done.
        outputs
            Positions of tasks that were asked for: unless everything stays, they get a segment of their own, and so
            do errors.
        carried
            Small results of the entry before. While all of them fit, they ride in this entry
            too: so the newest entry has them all, and who collects them reads one object.
        """
        bodies = {position: ran.body for position, ran in finished.ran.items() if ran.body is not None} | dict(
            kept or {}
        )
        outgoing = cls(finished, kept=frozenset(kept or ()))
        small: dict[int, bytes] = {}
        small_size = 0
        ends = {Kind.SEGMENT: 0, Kind.LASTING: 0}
        for position, body in bodies.items():
            blob = seal(body)
            size = sum(memoryview(part).nbytes for part in blob)
            if size <= settings.inline_result and small_size + size <= settings.inline_entry:
                small[position] = b"".join(blob)
                small_size += size
            else:
                stays = position in outputs or (position in finished.ran and finished.ran[position].failed)
                kind = Kind.LASTING if stays and not settings.keep_intermediates else Kind.SEGMENT
                (outgoing.lasting if kind is Kind.LASTING else outgoing.segment).extend(blob)
                outgoing.places[position] = (kind, ends[kind], ends[kind] + size)
                ends[kind] += size
        if sum(map(len, carried.values())) + small_size <= settings.inline_entry:
            outgoing.carried = frozenset(carried)
            small = {**carried, **small}
        outgoing.inline = small
        end = 0
        for position, data in outgoing.inline.items():
            outgoing.places[position] = (Kind.INLINE, end, end + len(data))
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
        numbers: dict[Kind, int] = {}
        for kind, name, there in (
            (Kind.INLINE, f"@{shard.next}", bool(self.inline)),
            (Kind.SEGMENT, self.segment_name, bool(self.segment)),
            (Kind.LASTING, self.lasting_name, bool(self.lasting)),
        ):
            if there:
                numbers[kind] = len(shard.index.objects) + len(names)
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
                p: Location(numbers[kind], start, end)
                for p, (kind, start, end) in self.places.items()
                if p in ran or p in self.carried or p in self.kept
            },
            upstream=upstream,
            seconds=sum(one.seconds for one in ran.values()),
            ran=sum(not one.cancelled for one in ran.values()),
            logs={self.logs_name: logged} if self.logs_name else {},
            tries={p: tries for p, tries in self.finished.tries.items() if p in pending},
            cancelled=Bitmap.of(self.finished.cancelled) & failed,
        ), tuple(names)
