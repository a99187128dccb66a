"""Lists that print as tables, also where there is little room."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from burst_dask.report.lists import SessionList, SessionRow, Story, StoryLine

COUNTS = {"total": 10, "pending": 0, "running": 2, "completed": 7, "failed": 1, "cancelled": 0}
ROWS = [
    SessionRow("k3w9x2mq", "nightly", "open", 1e9, 1.1e9, "host", 2, COUNTS, 3, 0.125, 5_000_000),
    SessionRow("7gfh2ypz", None, "expired", 1e9, 1.1e9, "host"),
]


def printed(table: object, width: int) -> list[str]:
    text = StringIO()
    Console(file=text, width=width).print(table)
    return text.getvalue().splitlines()


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_ids_and_states_are_never_broken(width: int) -> None:
    lines = printed(SessionList("memory://x", ROWS), width)
    assert max(map(len, lines)) <= width
    for row in ROWS:
        (line,) = (line for line in lines if row.id in line)
        assert row.state in line


def test_with_little_room_columns_are_left_out() -> None:
    found = SessionList("memory://x", ROWS)
    assert (
        " ".join(printed(found, 200)[2].split()) == "id name state created last activity runs tasks workers cost size"
    )
    narrow = "\n".join(printed(found, 80))
    assert "last activity" in narrow and "created" not in narrow and "size" not in narrow
    assert set(found.to_dicts()[0]) >= {"created", "size", "cost"}


def test_stories_break_what_happened_and_nothing_else() -> None:
    story = Story("Story", [StoryLine(1e9, "shard 00012", "was reserved by w1: runs there, or is next " * 3)])
    lines = printed(story, 70)
    assert max(map(len, lines)) <= 70 and sum("shard 00012" in line for line in lines) == 1


def test_an_empty_list() -> None:
    assert "0 sessions in memory://x" in str(SessionList("memory://x", []))
