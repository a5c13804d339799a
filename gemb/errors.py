"""The errors a user can cause or meet, each with the exit code a scheduler acts on.

A `GembError` is shown as one message on stderr, without a traceback. Anything else is a bug of
gemb and keeps its traceback (exit code 1).
"""

from enum import IntEnum


class Exit(IntEnum):
    """What the exit code of a command tells a scheduler."""

    DONE = 0
    """All done."""
    FAILED = 1
    """A bug of gemb (with a traceback), or the machine failed: disk full, I/O error, out of memory."""
    USAGE = 2
    """The user's mistake: option, recipe, input file."""
    REJECTED = 3
    """Done, but some rows were rejected; the rejects file has line and reason."""
    MORE = 4
    """Stopped by a limit the user set; more work remains, run the same command again."""
    MISMATCH = 5
    """Model, prompt, dimension or index do not fit together."""
    LOCKED = 6
    """Another run holds the output."""
    UNAVAILABLE = 7
    """A model, index or library is not available: offline, gated, not found, damaged."""
    GATE = 8
    """A quality gate failed."""
    INTERRUPTED = 130
    """SIGINT; the state is saved."""
    TERMINATED = 143
    """SIGTERM; the state is saved."""
    CLOSED_PIPE = 141
    """The reader closed the pipe; nothing is printed."""


class GembError(Exception):
    """A mistake of the user, told in one message: what is wrong, the value, the rule, the next step."""

    exit_code: Exit = Exit.USAGE


class MachineError(GembError):
    """The machine failed: disk full, I/O error, out of memory at the smallest batch."""

    exit_code = Exit.FAILED


class MismatchError(GembError):
    """Model, prompt, dimension or index do not fit together."""

    exit_code = Exit.MISMATCH


class LockedError(GembError):
    """Another run holds the output."""

    exit_code = Exit.LOCKED


class UnavailableError(GembError):
    """A model, index or library cannot be had: offline, gated, not found, damaged."""

    exit_code = Exit.UNAVAILABLE


class GateError(GembError):
    """A quality gate failed."""

    exit_code = Exit.GATE


class Interrupted(GembError):
    """SIGINT or SIGTERM arrived; the message says what is saved and how to go on."""

    def __init__(self, message: str, exit_code: Exit) -> None:
        super().__init__(message)
        self.exit_code = exit_code
