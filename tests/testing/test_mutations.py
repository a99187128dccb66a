"""The simulator must be able to find bugs: each of `mutations`, put into the product, breaks a rule in some seed."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from mutations import MUTATIONS, Patch

from burst_dask.testing.world import play

#: Seeds in which a mutation must show itself, at most.
SEEDS = 150


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_caught(name: str, monkeypatch: Patch) -> None:
    MUTATIONS[name](monkeypatch)
    for seed in range(SEEDS):
        if play(seed).broken:
            return
    pytest.fail(f"{MUTATIONS[name].__doc__} No rule was broken in {SEEDS} seeds")
