import os

import psutil
import pytest

from burst_dask.errors import ConfigError
from burst_dask.worker.memory_watch import parse_bytes, processors, resident, system_memory


def test_container_limits_win_over_the_machine(tmp_path):
    assert system_memory(tmp_path) == psutil.virtual_memory().total
    (tmp_path / "memory.max").write_text("104857600\n")
    assert system_memory(tmp_path) == 104857600
    (tmp_path / "memory.max").write_text("max\n")
    assert system_memory(tmp_path) == psutil.virtual_memory().total


def test_processor_quota_is_rounded_up(tmp_path):
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert processors(tmp_path) == 1
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert processors(tmp_path) == len(os.sched_getaffinity(0))


def test_old_control_groups(tmp_path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("1")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000")
    assert processors(tmp_path) == 1


@pytest.mark.parametrize("text", ["", "GB", "8 XB", "-1GB", "8GB8"])
def test_nonsense_is_refused_by_name(text):
    with pytest.raises(ConfigError, match="8GB or 512MiB"):
        parse_bytes(text)


def test_resident_of_this_process_and_of_none():
    assert resident(os.getpid()) > 1_000_000
    assert resident(2**22 + 1) == 0
