"""The model of the shard log: every search of it, and that its page speaks of functions that exist."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from operator import attrgetter
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parent.parent / "model"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("model_check", FOLDER / "check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


model = _load()
needs_spin = pytest.mark.skipif(bool(model.missing()), reason=f"the model is not checked: {model.missing()}")
PAGE = (FOLDER / "README.md").read_text()


def _label(check: object) -> str:
    return check.name + ("-liveness" if check.liveness and check.finds else "")


@pytest.fixture(scope="module")
def held() -> dict[object, object]:
    """What each configuration's search found: all at once, because two of them run side by side."""
    return dict(zip(model.CONFIGURATIONS, model.search_all(model.CONFIGURATIONS), strict=True))


@pytest.fixture(scope="module")
def broken() -> dict[object, object]:
    """What the search of each mutation found."""
    return dict(zip(model.MUTATIONS, model.search_all(model.MUTATIONS, mutation=True), strict=True))


@needs_spin
@pytest.mark.parametrize("check", model.CONFIGURATIONS, ids=_label)
def test_the_protocol_holds_in_every_state(check: object, held: dict[object, object]) -> None:
    found = held[check]
    assert found.errors == 0, found.violated
    assert not found.incomplete
    stated = re.search(rf"^\| {check.name} \| `{re.escape(check.flags)}` \| ([\d,]+) \|", PAGE, re.MULTILINE)
    assert stated is not None, "model/README.md lacks this search"
    assert found.states == int(stated[1].replace(",", "")), "model/README.md states another number"


@needs_spin
@pytest.mark.parametrize("check", model.MUTATIONS, ids=_label)
def test_a_broken_protocol_is_found(check: object, broken: dict[object, object]) -> None:
    found = broken[check]
    assert found.errors > 0
    assert check.finds in found.violated


@needs_spin
def test_a_search_that_is_cut_short_is_not_taken_for_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "DEPTH", 50)
    found = model.search(model.Check("plain", ""), tmp_path, mutation=True)
    assert "max search depth too small" in found.incomplete


def test_the_page_lists_every_mutation() -> None:
    listed = set(re.findall(r"^\| `(\w+)` \|", PAGE.split("## Model and code")[0], re.MULTILINE))
    assert listed == {check.name for check in model.MUTATIONS}


def _named_functions() -> list[str]:
    return sorted(set(re.findall(r"`(burst_dask[\w.]*:[\w.]+)`", PAGE)))


def test_the_page_names_functions() -> None:
    assert len(_named_functions()) > 30


@pytest.mark.parametrize("name", _named_functions())
def test_a_function_that_the_page_names_exists(name: str) -> None:
    module, _, path = name.partition(":")
    assert callable(attrgetter(path)(importlib.import_module(module)))


def test_steps_that_the_page_names_are_in_the_model() -> None:
    text = " ".join((FOLDER / "shard_log.pml").read_text().split())
    for row in re.findall(r"^\| ([^|]+) \| `burst_dask", PAGE, re.MULTILINE):
        for step in row.split("; "):
            assert step.strip("`") in text, step
