"""Fixtures for every test: the command line in or beside this process, a clean environment, no network."""

import io
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
"""The repository."""

DATA = ROOT.parent / "shared" / "data"
"""Real data that some machines have."""

_TERMINAL_VARIABLES = ("NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE", "CI", "TERM", "COLUMNS", "LINES")


@dataclass(frozen=True)
class Finished:
    """How a run of the command line ended."""

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the developer's shell decides a test, and nothing is ever downloaded."""
    for name in [*_TERMINAL_VARIABLES, *(name for name in os.environ if name.startswith("GEMB_"))]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that opens a connection to another machine fails."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:  # noqa: ANN401  # as in socket
        host = address[0] if isinstance(address, tuple) else ""
        if self.family in (socket.AF_INET, socket.AF_INET6) and host not in ("127.0.0.1", "::1", "localhost"):
            pytest.fail(f"a test opened a connection to {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture
def app() -> Any:  # noqa: ANN401  # nobody imports gemb.commands by name, see docs/architecture.md
    """The Typer app."""
    return import_module("gemb.commands").app


@pytest.fixture
def gemb(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Finished]:
    """Run the command line in this process: `gemb("recipes", "list")`; `stdin` is text or bytes."""

    def run(*arguments: str | Path, stdin: str | bytes = b"") -> Finished:
        content = stdin.encode() if isinstance(stdin, str) else stdin
        streams = {name: io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for name in ("stdout", "stderr")}
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
            for name, stream in streams.items():
                patch.setattr(sys, name, stream)
            with pytest.raises(SystemExit) as stop:
                import_module("gemb.commands").main([str(argument) for argument in arguments])
        for stream in streams.values():
            stream.flush()
            stream.buffer.seek(0)
        out, err = (stream.buffer.read().decode() for stream in streams.values())
        return Finished(int(stop.value.code or 0), out, err)

    return run


@pytest.fixture
def gemb_process() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start `python -m gemb ...` as a process of its own; it is ended with the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str | Path, **options: Any) -> subprocess.Popen[bytes]:  # noqa: ANN401
        command = [sys.executable, "-m", "gemb", *(str(argument) for argument in arguments)]
        options = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            **options,
        }
        process = subprocess.Popen(command, **options)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def modules_after(statement: str, *, arguments: Sequence[str] = ()) -> set[str]:
    """The top-level modules that a fresh Python has loaded after `statement`."""
    program = f"import sys\n{statement}\nsys.stderr.write(' '.join(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return {name.partition(".")[0] for name in done.stderr.split()}
