"""One process a device, behind the `Engine` protocol: batches out, vectors back.

Each process loads the model itself and computes what it is sent through a pipe. A process that dies
(killed, out of memory, a driver that gives up) costs the batches it held, which go to the others; the
death is told, and only the death of all ends the job.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection

import numpy as np
from numpy.typing import NDArray

from gemb.engine import Engine, OutOfMemory
from gemb.errors import GembError, MachineError
from gemb.text.batches import Batch

PREFETCH = 1  # batches a process holds beyond those it computes, so that it never waits for the pipe
CLOSE_SECONDS = 5.0  # a process gets so long to end by itself


class WorkerBug(Exception):
    """Something other than a failed batch went wrong in a process; the message is its traceback."""


class _Died(Exception):
    """The process that held the batch is gone."""


class ProcessEngine:
    """An `Engine` over several processes, one for each of `open_engines`.

    `open_engines` are picklable functions; each is called in its own, freshly started process and
    gives the engine of that process. `names` are the devices as the user knows them. `notice` hears
    of a process that died.

    Raises what `open_engines` raise, if that is a GembError, and MachineError if a process dies while
    it loads.
    """

    dims: int
    batch_tokens: int
    workers: int
    precision: str
    device_line: str
    notes: tuple[str, ...]

    def __init__(
        self,
        open_engines: Sequence[Callable[[], Engine]],
        names: Sequence[str],
        notice: Callable[[str], None],
    ) -> None:
        self._notice = notice
        self._change = threading.Condition()  # a place became free, or a process died
        self._processes: list[_Process] = []
        try:
            for open_engine, name in zip(open_engines, names, strict=True):
                self._processes.append(_Process(open_engine, name))
            for process in self._processes:  # all load at the same time
                process.wait_until_ready()
        except BaseException:
            self.close()
            raise
        first = self._processes[0]
        self.dims = first.dims
        self.batch_tokens = min(process.batch_tokens for process in self._processes)
        self.workers = sum(process.places for process in self._processes)
        self.precision = "+".join(sorted({process.precision for process in self._processes}))
        lines = dict.fromkeys(process.device_line for process in self._processes)
        self.device_line = f"{len(self._processes)} processes: " + "; ".join(lines)
        self.notes = tuple(dict.fromkeys(note for process in self._processes for note in process.notes))

    @property
    def process_ids(self) -> list[int]:
        """Process ids of the processes that are alive."""
        return [process.pid for process in self._processes if process.alive]

    def forward(self, batch: Batch) -> NDArray[np.float32]:
        """Vectors [B, D] of a batch, from whichever process has a free place.

        Raises OutOfMemory, RuntimeError and ValueError as the engine of the process does, WorkerBug
        for anything else it raises, and MachineError when no process is left.
        """
        while True:
            process = self._take()
            try:
                return process.compute(batch)
            except _Died:
                self._tell(process)
            finally:
                with self._change:
                    process.places += 1
                    self._change.notify_all()

    def close(self) -> None:
        """End all processes."""
        for process in self._processes:
            process.hang_up()
        for process in self._processes:
            process.end()

    def _take(self) -> _Process:
        with self._change:
            while True:
                alive = [process for process in self._processes if process.alive]
                if not alive:
                    ends = "; ".join(f"{process.name}: {process.ending()}" for process in self._processes)
                    raise MachineError(f"no process is left to compute ({ends}); run the same command again")
                free = max(alive, key=lambda process: process.places)
                if free.places > 0:
                    free.places -= 1
                    return free
                self._change.wait(timeout=1.0)

    def _tell(self, process: _Process) -> None:
        with self._change:
            if process.told:
                return
            process.told = True
            left = sum(other.alive for other in self._processes)
        self._notice(f"the process of {process.name} died ({process.ending()}); going on with {left}")


class _Process:
    """One process as its parent sees it: a pipe, and a future for each batch it holds."""

    def __init__(self, open_engine: Callable[[], Engine], name: str) -> None:
        self.name = name
        self.alive = True
        self.told = False
        self.places = 0
        self._lock = threading.Lock()
        self._reaping = threading.Lock()  # of two threads that wait for one process, one finds no exit code
        self._waiting: dict[int, Future[NDArray[np.float32]]] = {}
        self._sent = 0
        context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks
        self._connection, far_end = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(open_engine, far_end), name=f"gemb-{name}", daemon=True
        )
        self._process.start()
        far_end.close()  # so that its death is an end of file here

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    def wait_until_ready(self) -> None:
        try:
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            self.alive = False
            raise MachineError(
                f"the process of {self.name} died while it loaded the model ({self.ending()})"
            ) from error
        if isinstance(answer, BaseException):
            raise answer
        self.dims, self.batch_tokens, workers, self.precision, self.device_line, self.notes = answer
        self.places = workers + PREFETCH
        threading.Thread(target=self._receive, name=f"gemb-from-{self.name}", daemon=True).start()

    def compute(self, batch: Batch) -> NDArray[np.float32]:
        answer: Future[NDArray[np.float32]] = Future()
        with self._lock:
            if not self.alive:
                raise _Died
            number = self._sent
            self._sent += 1
            self._waiting[number] = answer
            try:
                self._connection.send((number, batch))
            except OSError:
                pass  # the receiving thread sees the end of the pipe and fails the future
        return answer.result()

    def _receive(self) -> None:
        while True:
            try:
                number, value = self._connection.recv()
            except (EOFError, OSError):
                break
            with self._lock:
                answer = self._waiting.pop(number)
            if isinstance(value, BaseException):
                answer.set_exception(value)
            else:
                answer.set_result(value)
        with self._lock:
            self.alive = False
            lost, self._waiting = self._waiting, {}
        for answer in lost.values():
            answer.set_exception(_Died())

    def hang_up(self) -> None:
        """Tell the process to end; it does so after the batch it computes."""
        try:
            with self._lock:
                self._connection.send(None)
        except OSError:
            pass  # it is gone already

    def end(self) -> None:
        with self._reaping:
            self._process.join(CLOSE_SECONDS)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
        self.alive = False

    def ending(self) -> str:
        with self._reaping:
            self._process.join(CLOSE_SECONDS)
            code = self._process.exitcode
        if code is None:
            return "it does not answer"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _serve(open_engine: Callable[[], Engine], connection: Connection) -> None:
    """The life of a process: load, then batch after batch, until the pipe ends."""
    # Both reach the whole group (Ctrl-C, Slurm, systemd); the parent decides, and its end ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.dup2(2, 1)  # stdout is data of the parent; what libraries print belongs to stderr
    try:
        engine = open_engine()
    except GembError as error:
        connection.send(_portable(error))
        return
    connection.send(
        (
            engine.dims,
            engine.batch_tokens,
            engine.workers,
            engine.precision,
            engine.device_line,
            engine.notes,
        )
    )
    sending = threading.Lock()

    def answer(number: int, batch: Batch) -> None:
        value: NDArray[np.float32] | BaseException
        try:
            value = engine.forward(batch)
        except OutOfMemory as error:
            value = OutOfMemory(str(error))
        except (RuntimeError, ValueError) as error:
            value = RuntimeError(str(error))
        except BaseException:  # told to the parent, which raises it
            value = WorkerBug(traceback.format_exc())
        try:
            with sending:
                connection.send((number, value))
        except OSError:
            pass  # the parent is gone; the loop below sees it too

    with ThreadPoolExecutor(engine.workers) as pool:
        while True:
            try:
                message = connection.recv()
            except (EOFError, OSError):
                break
            if message is None:
                break
            pool.submit(answer, *message)
    engine.close()


def _portable(error: GembError) -> GembError:
    """The error if it survives a pipe, else one with its message and code."""
    try:
        pickle.loads(pickle.dumps(error))
    except (TypeError, pickle.PicklingError):
        plain = GembError(str(error))
        plain.exit_code = error.exit_code
        return plain
    return error
