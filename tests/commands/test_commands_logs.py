"""``burst logs``: what it prints, for people and for scripts."""

from __future__ import annotations

import json
import logging
import re

import dask
import pytest
from click.testing import CliRunner

from burst_dask import Session, cli
from burst_dask.worker.output import LIMIT


def speak(word: str) -> None:
    print(f"I say {word}\nand again {word}")
    logging.getLogger("lab").warning("%s said", word)


def chatter() -> None:
    print("x" * LIMIT)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run on real workers that is done, and its session."""
    session = Session(tmp_path_factory.mktemp("store"), workers=1, progress=False)
    tasks = [dask.delayed(speak)(word, dask_key_name=f"speak-{word}") for word in ("ham", "egg")]
    run = session.compute(*tasks, dask.delayed(chatter)(dask_key_name="chatter"))
    run.wait(60)
    yield run, session
    session.cleanup(force=True)


def burst(session, *arguments):
    return CliRunner().invoke(cli.main, ["logs", *arguments, "--store", session.store])


def test_lines_with_time_key_and_stream(done):
    run, session = done
    shown = burst(session, run.id, "--key", "speak-egg")
    assert shown.exit_code == 0
    lines = [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in shown.stdout.splitlines()]
    assert lines == [
        "speak-egg | I say egg",
        "speak-egg | and again egg",
        "speak-egg WARNING | lab: egg said",
    ]


@pytest.mark.parametrize("options", [[], ["--follow"]])
def test_of_a_run_and_of_a_session(done, options):
    run, session = done
    for identifier in (run.id, session.id):
        shown = burst(session, identifier, *options)
        assert shown.exit_code == 0
        assert all(f"speak-{word} | I say {word}\n" in shown.stdout for word in ("ham", "egg"))
        assert shown.stderr == "(chatter: 1 characters before the last ones were not kept)\n"


def test_of_one_worker(done):
    run, session = done
    (worker,) = run.logs("speak-ham").workers
    assert "I say ham" in burst(session, session.id, "--worker", worker).stdout
    assert burst(session, session.id, "--worker", "nosuch").stdout == ""


@pytest.mark.parametrize("options", [[], ["--follow"]])
def test_json_has_one_object_a_line(done, options):
    run, session = done
    shown = burst(session, run.id, "--key", "speak-ham", "--json", *options)
    first, second = map(json.loads, shown.stdout.splitlines())
    assert (first["run"], first["key"], first["stream"], first["attempt"]) == (run.id, "speak-ham", "stdout", 1)
    assert (first["text"], second["stream"]) == ("I say ham\nand again ham\n", "WARNING")


def test_errors(done):
    run, session = done
    shown = burst(session, run.id, "--key", "speak-eg")
    assert shown.exit_code == 1 and "did you mean 'speak-egg'" in shown.output
    shown = burst(session, session.id, "--key", "speak-egg")
    assert shown.exit_code == 2 and "--key needs the id of a run" in shown.output
