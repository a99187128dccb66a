"""The command line: errors in one message, exit codes, and that it starts light."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

import burst_dask
from burst_dask import cli
from burst_dask.errors import StoreMissing, UnknownId


def run(*arguments):
    return CliRunner().invoke(cli.main, arguments)


@pytest.fixture
def attached(monkeypatch):
    """Stands in for `attach`; remembers how it was called."""
    calls = []
    status = SimpleNamespace(to_dict=lambda: {"total": 3, "done": 1})

    def cleanup(*, force):
        calls.append(force)

    def attach(identifier, store=None, signed=False):
        calls.append((identifier, store, *(["signed"] if signed else [])))
        if identifier == "nosuch":
            raise UnknownId("there is no session 'nosuch'; did you mean 'nosuck'?")
        return SimpleNamespace(status=lambda: status, cleanup=cleanup)

    monkeypatch.setattr("burst_dask.commands.options.attach", attach)
    return calls


def test_help_lists_every_command():
    shown = run("--help").output
    for name in cli._COMMANDS:
        assert f"\n  {name} " in shown


def test_version():
    assert run("--version").output == f"burst, version {burst_dask.__version__}\n"


def test_status_as_json(attached):
    shown = run("status", "k3w9x2mq.7gfh", "--store", "memory://a", "--json")
    assert json.loads(shown.output) == {"total": 3, "done": 1}
    assert attached == [("k3w9x2mq.7gfh", "memory://a")]


def test_signed_before_the_command_refuses_what_is_not(attached, monkeypatch):
    run("--signed", "status", "k3w9x2mq", "--json")
    monkeypatch.setenv("BURST_SIGNED", "1")
    run("status", "k3w9x2mq", "--json")
    assert attached == [("k3w9x2mq", None, "signed")] * 2


def test_cleanup_passes_force_on(attached):
    assert run("cleanup", "k3w9x2mq", "--force").output == "k3w9x2mq is cleaned up\n"
    assert attached == [("k3w9x2mq", None), True]


def test_own_errors_are_one_message_and_exit_code_1(attached):
    shown = run("status", "nosuch")
    assert (shown.exit_code, shown.output) == (1, "Error: there is no session 'nosuch'; did you mean 'nosuck'?\n")


def test_own_errors_of_commands_that_live_elsewhere(monkeypatch):
    def fail(*_):
        raise StoreMissing("there is no bucket 'x'")

    monkeypatch.setattr("burst_dask.demo.run_demo", fail)
    shown = run("demo", "--store", "s3://x")
    assert (shown.exit_code, shown.output) == (1, "Error: there is no bucket 'x'\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuch"], "No such command 'nosuch'"),
        (["worker", "--session", "abc"], "Missing option '--store'"),
        (["worker", "--session", "a/b", "--store", "memory://"], "'a/b' is not a session id"),
        (["worker", "--session", "a", "--store", "memory://", "--processes", "0"], "0 is not in the range x>=1"),
        (["worker", "--session", "a", "--store", "memory://", "--memory-limit", "lots"], "'lots' is not an amount"),
        (["demo", "--workers", "1"], "1 is not in the range x>=2"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments, message):
    shown = run(*arguments)
    assert shown.exit_code == 2 and message in shown.output


def test_installed_command_starts_without_dask():
    code = "import sys; from burst_dask.cli import main; print({'dask', 'rich', 'numpy'} & set(sys.modules) or 'light')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "light\n"
