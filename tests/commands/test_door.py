"""From exceptions to messages and exit codes."""

import errno
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from typing import NoReturn

import pytest
import typer

from gemb.errors import Exit, GembError, Interrupted, LockedError, UnavailableError
from tests.conftest import ROOT

door = importlib.import_module("gemb.commands._door")


def app_that(action: Callable[[], object]) -> typer.Typer:
    """A Typer app whose one command does `action`."""
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)

    @app.command()
    def run() -> object:
        return action()

    return app


def raising(error: BaseException) -> Callable[[], NoReturn]:
    def action() -> NoReturn:
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (GembError("docs.jsonl:3: no text"), 2, "docs.jsonl:3: no text"),
        (GembError("a.yaml: 2 problems\n  one\n  two"), 2, "a.yaml: 2 problems\n  one\n  two"),
        (LockedError("docs.npy is held by process 7"), 6, "docs.npy is held by process 7"),
        (UnavailableError("no model x"), 7, "no model x"),
        (Interrupted("saved; run again", Exit.TERMINATED), 143, "saved; run again"),
        (OSError(errno.EIO, "Input/output error"), 1, "input/output error"),
        (
            OSError(errno.EROFS, "Read-only file system", "/mnt/x"),
            2,
            "cannot write /mnt/x: the file system is read-only; choose another path",
        ),
        (MemoryError(), 1, "out of memory; try a smaller --batch-tokens, or fewer processes at a time"),
    ],
)
def test_an_expected_failure_is_one_message_and_its_code(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert door.run_door(app_that(raising(error)), []) == code
    assert capsys.readouterr() == ("", f"gemb: {message}\n")


def test_a_full_disk_that_nobody_expected_is_told_with_its_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    assert door.run_door(app_that(raising(OSError(errno.ENOSPC, "No space left on device", "/x"))), []) == 1
    message = capsys.readouterr().err
    assert message.startswith("gemb: cannot write /x: no space left (")
    assert message.endswith("free); free some space, then run the same command again\n")


def test_ctrl_c_is_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert door.run_door(app_that(raising(KeyboardInterrupt())), []) == 130
    assert capsys.readouterr() == ("", "gemb: interrupted\n")


@pytest.mark.parametrize(
    "error", [ValueError("x"), ZeroDivisionError(), OSError(errno.ENOENT, "No such file", "x"), KeyError("k")]
)
def test_a_bug_keeps_its_traceback_and_asks_to_be_reported(
    error: BaseException, capsys: pytest.CaptureFixture[str]
) -> None:
    assert door.run_door(app_that(raising(error)), []) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Traceback (most recent call last):\n")
    assert "in action\n" in err
    assert err.endswith(
        "\ngemb: this is a bug of gemb; please report it with the lines above and with gemb --version\n"
    )


def test_the_exit_code_of_a_report_is_that_of_the_command() -> None:
    assert door.run_door(app_that(raising(typer.Exit(3))), []) == 3
    assert door.run_door(app_that(lambda: None), []) == 0


PROGRAM = """
import sys, typer
from importlib import import_module
app = typer.Typer(pretty_exceptions_enable=False)
@app.command()
def run() -> None:
    {body}
sys.exit(import_module("gemb.commands._door").run_door(app, []))
"""


def run_program(body: str, redirect: str) -> subprocess.CompletedProcess[str]:
    """Run a command with this body in a shell, after `redirect`; its exit code is the last line of stdout."""
    script = f'{{ "$PYTHON" -c "$PROGRAM"; echo $? > "$CODE"; }} {redirect}; cat "$CODE"'
    return subprocess.run(
        ["bash", "-c", script],
        env={
            **{name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
            "PYTHONPATH": str(ROOT),
            "PYTHON": sys.executable,
            "PROGRAM": PROGRAM.format(body=body),
            "CODE": "code",
        },
        capture_output=True,
        text=True,
        check=True,
    )


@pytest.mark.parametrize(
    "body",
    [
        "for n in range(100_000): sys.stdout.write(str(n) + chr(10))",
        "for n in range(100_000): sys.stdout.buffer.write(b'x' * 50)",
        "sys.stdout.buffer.write(b'x' * 5000)",
        "[typer.echo(n) for n in range(100_000)]",
        "sys.stdout.write('x' * 5000)",  # fits the buffer: only the flush at the end meets the closed pipe
    ],
)
def test_a_closed_pipe_is_silent_and_141(
    body: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(str(tmp_path))
    done = run_program(body, "| true")
    assert (done.stdout, done.stderr) == ("141\n", "")


def test_a_full_disk_under_stdout_is_told(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(str(tmp_path))
    done = run_program("sys.stdout.write('x' * 5000)", "> /dev/full")
    assert (done.stdout, done.stderr) == ("1\n", "gemb: no space left on device\n")


def test_a_closed_stdout_and_stderr_are_no_crash(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(str(tmp_path))
    assert run_program("pass", ">&- 2>&-").stdout == "0\n"
    assert run_program("raise ValueError", ">&- 2>&-").stdout == "1\n"


def test_ctrl_c_in_a_process_ends_with_130() -> None:
    program = PROGRAM.format(
        # Set anew, since whoever runs the tests in the background has SIGINT ignored.
        body="import os, signal, time; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "os.kill(os.getpid(), signal.SIGINT); time.sleep(9)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "gemb: interrupted\n")
