"""The commands on sessions: what they print for people and for scripts, and how they end."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import dask
import pandas
import pytest
from click.testing import CliRunner, Result

from burst_dask import Session, attach, cli, sync
from burst_dask.commands import watching
from burst_dask.errors import StoreUnavailable
from burst_dask.fleet.inprocess import InProcessFleet
from burst_dask.protocol.session_records import Close
from burst_dask.report.tables import RunStatus, SessionStatus, WorkersStatus


@pytest.fixture
def session(tmp_path: Path) -> Session:
    """A session with no workers."""
    return Session(tmp_path / "store", fleet=None, name="nightly", progress=False)


@pytest.fixture
def burst(session: Session) -> Callable[..., Result]:
    """The command, on the session's store."""

    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(cli.main, [*arguments, "--store", session.store])

    return invoke


def work(session: Session) -> None:
    fleet = InProcessFleet(session._link.session, session._link.store)
    fleet.ensure(1)
    for run in session.status().runs:
        attach(run.id, store=session._link.store).wait(timeout=30)
    fleet.stop()


def test_ls(session: Session, burst: Callable[..., Result]) -> None:
    session.compute(dask.delayed(1))
    assert "nightly" in burst("ls").output
    (row,) = json.loads(burst("ls", "--json").output)
    assert (row["id"], row["tasks"]["pending"]) == (session.id, 1)
    assert json.loads(burst("ls", "--json", "--details", "0").output)[0]["tasks"] is None


def test_status_by_name(session: Session, burst: Callable[..., Result]) -> None:
    assert burst("status", "nightly").output.startswith(f"Session {session.id} (nightly)")
    assert json.loads(burst("status", "nightly", "--json").output)["id"] == session.id


def test_story(session: Session, burst: Callable[..., Result]) -> None:
    run = session.compute(dask.delayed(abs)(1, dask_key_name="one"))
    assert "the session was opened" in burst("story", run.id).output
    assert json.loads(burst("story", run.id, "one", "--json").output)[0]["log"] == "session"
    refused = burst("story", session.id)
    assert refused.exit_code == 1
    assert refused.output == (
        f"Error: {session.id} is a session; a story is told of a run, and its runs are {run.id}\n"
    )


def test_cancel(session: Session, burst: Callable[..., Result]) -> None:
    run = session.compute(dask.delayed(1))
    assert burst("cancel", run.id).output == f"{run.id} is cancelled\n"
    assert run.status().state == "cancelled"
    other = session.compute(dask.delayed(1))
    assert json.loads(burst("cancel", session.id, "--force", "--json").output) == {"id": session.id, "cancelled": True}
    assert other.status().state == "cancelled"
    sync.run(session._link.follow())
    assert session._link.state.killed == {run.id, other.id}


def test_extend(session: Session, burst: Callable[..., Result]) -> None:
    assert f"{session.id} lasts until 20" in burst("extend", session.id, "30d").output
    sync.run(session._link.follow())
    data = json.loads(burst("extend", "nightly", "--json").output)
    assert data["deadline"] == pytest.approx(session._link.state.until)  # 1 h would shorten it
    assert "'soon' is not a duration" in burst("extend", "nightly", "soon").output
    assert "seconds=0.0" in burst("extend", "nightly", "0").output
    free = Session(session.store, fleet=None, session_timeout=None)
    assert burst("extend", free.id).output == f"{free.id} has no limit\n"
    run = session.compute(dask.delayed(1))
    assert f"burst extend {session.id}" in burst("extend", run.id).output


def test_scale(session: Session, burst: Callable[..., Result]) -> None:
    assert burst("scale", "nightly", "0").output == "nightly has 0 workers\n"
    assert burst("scale", "nightly", "many").exit_code == 2
    sync.run(session._link.append(Close()))
    refused = burst("scale", "nightly", "3")
    assert (refused.exit_code, "is closed" in refused.output) == (1, True)


def test_adapt(session: Session, burst: Callable[..., Result]) -> None:
    link = session._link
    wrong = burst("adapt", "nightly", "1", "2", "--within", "soon")
    assert (wrong.exit_code, "'soon' is not a duration" in wrong.output) == (1, True)
    try:
        said = burst("adapt", "nightly", "0", "2", "--within", "90m")
        assert said.output == "nightly has 0 to 2 workers, for what waits to be done in 1 h 30 min\n"
        sync.run(link.follow())
        assert (link.state.minimum, link.state.workers) == (0, 2)
        assert 5300 < link.state.done_by - link.clock.wall() <= 5500
    finally:
        burst("scale", "nightly", "0")


def test_a_name_may_look_like_the_id_of_a_run(session: Session, burst: Callable[..., Result]) -> None:
    dotted = Session(session.store, fleet=None, name="model.v2", progress=False)
    assert attach("model.v2", store=session.store).id == dotted.id
    assert burst("extend", "model.v2", "30d").output.startswith("model.v2 lasts until 20")
    assert burst("cleanup", "model.v2").output == "model.v2 is cleaned up\n"


def test_cleanup_of_a_run_names_its_session(session: Session, burst: Callable[..., Result]) -> None:
    run = session.compute(dask.delayed(1))
    refused = burst("cleanup", run.id, "--force")
    assert refused.exit_code == 1 and f"burst cleanup {session.id}\n" in refused.output
    assert run.status().total == 1  # nothing was done


def test_cleanup(session: Session, burst: Callable[..., Result]) -> None:
    run = session.compute(dask.delayed(1))
    assert f"still works on {run.id}" in burst("cleanup", "nightly").output
    assert json.loads(burst("cleanup", "nightly", "--force", "--json").output) == {"id": "nightly", "force": True}
    assert burst("status", session.id).exit_code == 1


# ---------------------------------------------------------------------------- watch


def test_watch_ends_with_the_run(session: Session, burst: Callable[..., Result]) -> None:
    good = session.compute(dask.delayed(abs)(1))
    work(session)
    watched = burst("watch", good.id)
    assert (watched.exit_code, watched.output) == (0, f"{good.id} done: 1 completed of 1; 0 workers\n")
    session.compute(dask.delayed(divmod)(1, 0))
    work(session)
    watched = burst("watch", session.id, "--json")
    assert watched.exit_code == 1
    assert json.loads(watched.output)["totals"]["failed"] == 1


def test_watch_of_what_will_not_be_done(session: Session, burst: Callable[..., Result]) -> None:
    assert not watching._is_over(session.status())  # a run may come
    run = session.compute(dask.delayed(1))
    sync.run(session._link.append(Close()))
    assert burst("watch", run.id).output == f"{run.id} stopped: 1 pending of 1; 0 workers\n"
    assert burst("watch", session.id).exit_code == 1


class Played:
    """Something to watch whose statuses are given."""

    def __init__(self, *statuses: RunStatus | Exception) -> None:
        self.statuses = list(statuses)

    def status(self) -> RunStatus:
        found = self.statuses.pop(0)
        if isinstance(found, Exception):
            raise found
        return found


class NoTime:
    async def sleep(self, seconds: float) -> None:
        pass

    def monotonic(self) -> float:
        return 0.0

    def wall(self) -> float:
        return 0.0


def status(state: str, completed: int, running: int = 0) -> RunStatus:
    return RunStatus("s.r", state, 4, completed, 0, running, 0, 1.0, WorkersStatus(1, 1.0))


def test_watch_survives_a_network_that_is_away() -> None:
    played = Played(status("pending", 0), StoreUnavailable("away"), status("running", 2, 1), status("done", 4))
    assert [seen.completed for seen in watching._statuses(played, NoTime(), 9.0)] == [0, 2, 4]


def test_ctrl_c_ends_a_watch_with_130_and_not_the_run(session: Session) -> None:
    run = session.compute(dask.delayed(1))
    command = [sys.executable, "-m", "burst_dask.cli", "watch", run.id, "--store", session.store]
    watch = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert watch.stdout is not None and watch.stdout.readline().startswith(f"{run.id} pending")
    watch.send_signal(signal.SIGINT)
    _, complaint = watch.communicate(timeout=60)
    assert (watch.returncode, complaint) == (130, "")
    assert run.status().state == "pending"


def test_watch_waits_for_running_tasks_of_a_cancelled_run() -> None:
    played = Played(status("cancelled", 1, running=2), status("cancelled", 3))
    assert len(list(watching._statuses(played, NoTime(), 9.0))) == 2


def test_watch_prints_a_line_a_change(capsys: pytest.CaptureFixture[str]) -> None:
    with watching._view(as_json=False) as update:
        for one in (status("pending", 0), status("pending", 0), status("running", 1, 2), status("done", 4)):
            update(one)
    assert capsys.readouterr().out.splitlines() == [
        "s.r pending: 4 pending of 4; 1 workers",
        "s.r running: 1 pending, 2 running, 1 completed of 4; 1 workers",
        "s.r done: 4 completed of 4; 1 workers",
    ]


def test_watch_keeps_a_table_up_to_date_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []

    class Live:
        def __init__(self, **options: Any) -> None:
            assert options["auto_refresh"] is False

        def __enter__(self) -> Live:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def update(self, status: Any, refresh: bool) -> None:
            shown.append((status, refresh))

    monkeypatch.setattr("burst_dask.commands.watching.Live", Live)
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    with watching._view(as_json=False) as update:
        update(status("running", 1))
    assert shown == [(status("running", 1), True)]


def test_a_session_in_one_line() -> None:
    runs = (status("done", 4), status("running", 1, 1))
    seen = SessionStatus("s", None, "memory://", "h", "open", 0.0, None, WorkersStatus(2, 1.0), runs, {}, 0.0, {})
    assert watching.line_of(seen) == "s open: 2 pending, 1 running, 5 completed of 8; 2 workers"


# ---------------------------------------------------------------------------- the shell


@pytest.mark.parametrize("name", sorted(cli._COMMANDS))
def test_every_command_helps(name: str) -> None:
    command = cli.main.get_command(click.Context(cli.main), name)
    assert command is not None and command.help
    assert CliRunner().invoke(cli.main, [name, "--help"]).exit_code == 0


def test_shells_complete_commands() -> None:
    code = "from burst_dask.cli import main; main(prog_name='burst')"
    words = {"COMP_WORDS": "burst s", "COMP_CWORD": "1"}
    environment = {"_BURST_COMPLETE": "bash_complete", "PYTHONPATH": ":".join(sys.path), **words}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert found.stdout.split() == ["plain,scale", "plain,setup", "plain,status", "plain,story"]


def test_collect_writes_what_is_done_and_tells_what_is_not(
    session: Session, burst: Callable[..., Result], tmp_path: Path
) -> None:
    def fail() -> None:
        raise ValueError("no such station")

    run = session.compute(dask.delayed(sum)([1, 2], dask_key_name="three"), dask.delayed(fail)(dask_key_name="bad"))
    output = tmp_path / "results.pkl"
    early = burst("collect", run.id, "-o", str(output))
    assert early.exit_code == 1 and "0 results, 0 failed, 2 pending" in early.output
    work(session)
    found = burst("collect", "nightly", "-o", str(output), "--json")
    assert found.exit_code == 1
    summary = json.loads(found.output)
    assert (summary["results"], summary["pending"], list(summary["errors"])) == (1, 0, ["bad"])
    assert "no such station" in summary["errors"]["bad"]
    results = pickle.loads(output.read_bytes())
    assert results["three"] == 3 and "no such station" in results["bad"].message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.pkl", "store"]


def test_collect_writes_dataframes_as_one_table(session: Session, burst: Callable[..., Result], tmp_path: Path) -> None:
    def part(number: int) -> pandas.DataFrame:
        return pandas.DataFrame({"n": [number, number + 1]})

    run = session.compute(*[dask.delayed(part)(number) for number in (0, 10)])
    work(session)
    output = tmp_path / "results.parquet"
    assert burst("collect", run.id, "-o", str(output)).exit_code == 0
    assert sorted(pandas.read_parquet(output)["n"]) == [0, 1, 10, 11]


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("results.csv", 1, "must end with .pkl or .parquet"),
        ("nosuch/results.pkl", 1, "there is no directory"),
    ],
)
def test_collect_refuses_before_it_waits(
    session: Session, burst: Callable[..., Result], tmp_path: Path, name: str, code: int, message: str
) -> None:
    session.compute(dask.delayed(1))  # nobody works on it
    result = burst("collect", session.id, "--wait", "-o", str(tmp_path / name))
    assert result.exit_code == code and message in result.output and "Nothing was collected" in result.output


def test_collect_writes_classes_of_a_script(session: Session, burst: Callable[..., Result], tmp_path: Path) -> None:
    space: dict[str, Any] = {"__name__": "__main__"}
    exec("class Here:\n    value = 7", space)
    run = session.compute(dask.delayed(space["Here"])(dask_key_name="here"))
    work(session)
    assert burst("collect", run.id, "-o", str(tmp_path / "results.pkl")).exit_code == 0
    assert pickle.loads((tmp_path / "results.pkl").read_bytes())["here"].value == 7


def test_collect_writes_what_is_done_when_no_more_comes(
    session: Session, burst: Callable[..., Result], tmp_path: Path
) -> None:
    session.compute(dask.delayed(sum)([1, 2], dask_key_name="three"))
    work(session)
    session.compute(dask.delayed(sum)([2, 2], dask_key_name="four"))  # nobody works on it
    output = tmp_path / "results.pkl"
    late = burst("collect", "nightly", "--wait", "--timeout", "0.2", "-o", str(output), "--json")
    assert late.exit_code == 1 and "is not complete after" in late.stderr
    assert (json.loads(late.stdout)["pending"], pickle.loads(output.read_bytes())) == (1, {"three": 3})
    sync.run(session._link.append(Close()))
    over = burst("collect", "nightly", "--wait", "-o", str(output))
    assert over.exit_code == 1 and "is closed, and its workers have gone" in over.stderr
    assert "1 results, 0 failed, 1 pending" in over.stdout
    assert burst("collect", "nightly", "--timeout", "3").exit_code == 2


def test_collect_tells_what_could_not_be_written(
    session: Session, burst: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("cloudpickle.dump", full)
    (tmp_path / "results.pkl").write_bytes(b"of before")
    result = burst("collect", session.id, "-o", str(tmp_path / "results.pkl"))
    assert result.exit_code == 1 and "could not be written: no space left" in result.output
    assert (tmp_path / "results.pkl").read_bytes() == b"of before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.pkl", "store"]


def test_collect_of_a_session_without_runs(session: Session, burst: Callable[..., Result], tmp_path: Path) -> None:
    result = burst("collect", session.id, "--wait", "-o", str(tmp_path / "results.pkl"))
    assert (result.exit_code, pickle.loads((tmp_path / "results.pkl").read_bytes())) == (0, {})


def test_of_a_key_that_several_runs_have_the_last_result_counts(
    session: Session, burst: Callable[..., Result], tmp_path: Path
) -> None:
    for number in (1, 2):
        session.compute(dask.delayed(abs)(number, dask_key_name="same"))
        work(session)
    burst("collect", "nightly", "-o", str(tmp_path / "results.pkl"))
    assert pickle.loads((tmp_path / "results.pkl").read_bytes()) == {"same": 2}
