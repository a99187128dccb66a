"""PROTOCOL.md names the tests of its rules, and they are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "burst_dask" / "protocol" / "PROTOCOL.md").read_text()


def test_the_tests_that_it_names_are_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", TEXT)
    assert len(named) > 40
    for file, test in named:
        source = (ROOT / file).read_text()
        assert not test or re.search(rf"\bdef {test}\b", source), f"{file}::{test}"


def test_each_rule_names_one() -> None:
    rules = re.split(r"^\*\*(\d+)\. ", TEXT, flags=re.M)[1:]
    numbers, texts = rules[::2], rules[1::2]
    assert numbers == [str(number) for number in range(1, 11)]
    for number, text in zip(numbers, texts, strict=True):
        assert "`tests/" in text.split("\n## ")[0], f"rule {number}"
