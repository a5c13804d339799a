"""From an exception to one message and an exit code, for every command alike."""

import contextlib
import errno
import gc
import os
import sys
import traceback
from collections.abc import Callable

from typer import Abort, TyperException

from gemb.errors import Exit, GembError

_OTHER_MACHINE_FAILURES = frozenset({errno.EROFS, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT})
"""What the machine does to us, and no bug, besides gemb.files.MACHINE_FAILURES."""

_OBJECTS_BEFORE_COLLECTING = 100_000  # CPython's default is 700


def run_door(app: Callable[..., object], arguments: list[str]) -> int:
    """Run the Typer `app` and give the exit code; every failure has then been told on stderr.

    A GembError is one message. A full disk and the like is one message, too (exit code 1). Anything else
    keeps its traceback and asks to be reported (exit code 1). A closed pipe is silent (141).
    """
    # Modules make many objects, and they stay: looking for garbage among them is a tenth of the start.
    gc.set_threshold(_OBJECTS_BEFORE_COLLECTING)
    code = _closing(lambda: _run(app, arguments))
    return code if code else _closing(_flush)


def _run(app: Callable[..., object], arguments: list[str]) -> int:
    """The exit code of `app`; usage errors are told here, with the command that explains them."""
    try:
        result = app(args=arguments, prog_name="gemb", standalone_mode=False)
    except TyperException as error:
        if error.message.startswith("Usage:"):  # a group without a subcommand explains itself
            _write(error.message)
        else:
            _tell(_usage_message(error))
        return error.exit_code
    except Abort:  # end of input at a question
        _tell("aborted")
        return Exit.INTERRUPTED
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # typer turns a closed pipe into SystemExit(1)
            raise stop.__context__ from None
        raise
    if result == Exit.INTERRUPTED:  # typer turns KeyboardInterrupt into its exit code, and says nothing
        _tell("interrupted")
    return result if isinstance(result, int) else Exit.DONE


def _flush() -> int:
    """Write out what stdout still holds, while a failure can still be told."""
    if sys.stdout is not None:
        sys.stdout.flush()
    return Exit.DONE


def _closing(step: Callable[[], int]) -> int:
    """Run `step` and turn its exception into message and code."""
    try:
        return step()
    except GembError as error:
        _tell(str(error))
        return error.exit_code
    except BrokenPipeError:
        _forget_stdout()
        return Exit.CLOSED_PIPE
    except KeyboardInterrupt:  # outside typer: while stdout is flushed into a pager, say
        _tell("interrupted")
        return Exit.INTERRUPTED
    except MemoryError:
        _tell("out of memory; try a smaller --batch-tokens, or fewer processes at a time")
        return Exit.FAILED
    except OSError as error:
        from gemb.files import MACHINE_FAILURES, explain_os_error

        if error.errno not in MACHINE_FAILURES and error.errno not in _OTHER_MACHINE_FAILURES:
            return _bug()
        explained = explain_os_error(error, os.fsdecode(error.filename or ""))
        # Without a name it was stdout, or nobody knows what: no advice about a place then.
        _tell(str(explained) if error.filename else (error.strerror or str(error)).lower())
        _forget_stdout()
        return explained.exit_code
    except Exception:  # the one place: the traceback is shown, whatever it is
        return _bug()


def _usage_message(error: TyperException) -> str:
    """Typer's message in our style: `gemb embed: no such option: --dimz; did you mean --dims?`."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "gemb"
    close = getattr(error, "possibilities", None)
    message = " ".join((error.message if close else error.format_message()).split()).rstrip(".")
    message = message[:1].lower() + message[1:].replace(". Did you mean", "; did you mean")
    message = message.replace("Input should be", "it must be")
    if close:
        message += f"; did you mean {' or '.join(sorted(close))}?"
    elif not message.endswith("?"):
        message += f"; see {path} --help"
    subcommand = path.partition(" ")[2]
    return f"{subcommand}: {message}" if subcommand else message


def _tell(message: str) -> None:
    """One message on stderr."""
    _write(f"gemb: {message}")


def _write(text: str) -> None:
    """`text` on stderr; without a stderr the exit code has to do."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            sys.stderr.write(text + "\n")
            sys.stderr.flush()


def _bug() -> int:
    """Show the traceback of the exception at hand, and where to take it."""
    _write(traceback.format_exc().rstrip())
    _tell("this is a bug of gemb; please report it with the lines above and with gemb --version")
    return Exit.FAILED


def _forget_stdout() -> None:
    """Send what stdout still holds to nowhere, so that Python's exit does not fail on it again."""
    if sys.stdout is not None:
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
