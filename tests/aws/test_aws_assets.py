"""The files of worker/ are found in a checkout, and a wheel carries them to where they are looked for."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from burst_dask.aws import assets
from burst_dask.errors import ConfigError

ROOT = Path(__file__).parents[2]
NAMES = (assets.TEMPLATE, assets.DOCKERFILE, assets.LOCK)


def test_a_checkout_has_them_in_worker():
    assert [assets.asset(name) for name in NAMES] == [ROOT / "worker" / name for name in NAMES]


def test_a_wheel_takes_them_along(monkeypatch, tmp_path):
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    for source, target in wheel["force-include"].items():  # as the build does
        (tmp_path / target).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / target).write_bytes((ROOT / source).read_bytes())
    monkeypatch.setattr(assets, "_HERE", tmp_path / "burst_dask" / "aws")
    for name in NAMES:
        assert assets.asset(name).read_bytes() == (ROOT / "worker" / name).read_bytes()
        assert assets.asset(name).is_relative_to(tmp_path)


def test_an_installation_that_lacks_one():
    with pytest.raises(ConfigError, match=r"lacks nothing\.yaml; install it again"):
        assets.asset("nothing.yaml")
