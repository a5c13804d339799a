"""Work that runs ahead in its own thread: an iterator with a few items in hand."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from queue import Empty, Full, Queue
from typing import Generic, TypeVar

T = TypeVar("T")

POLL_SECONDS = 0.1  # how often a thread that waits looks whether it still should


class ReadAhead(Generic[T]):
    """The items of an iterator, produced in a thread of its own, at most `depth` of them ahead.

    What the iterator raises is raised here, after the items before it. When `stop` is set, the thread
    ends after its current item and iteration ends at once, whatever is in hand.
    """

    def __init__(self, items: Iterator[T], *, depth: int, stop: threading.Event, name: str) -> None:
        self._items = items
        self._stop = stop
        self._closed = threading.Event()
        self._ready: Queue[tuple[T] | BaseException | None] = Queue(maxsize=depth)
        threading.Thread(target=self._produce, name=name, daemon=True).start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        item = self.take()
        while item is None:
            item = self.take()
        return item[0]

    def take(self, timeout: float = POLL_SECONDS) -> tuple[T] | None:
        """The next item, in a tuple of one; None if it takes longer than `timeout` seconds.

        Raises StopIteration at the end, and what the iterator raised.
        """
        if self._over():
            raise StopIteration
        try:
            item = self._ready.get(timeout=timeout)
        except Empty:
            return None
        if isinstance(item, tuple):
            return item
        self._closed.set()
        if item is None:
            raise StopIteration
        raise item

    def close(self) -> None:
        """End the iteration; the thread ends after its current item."""
        self._closed.set()

    def _over(self) -> bool:
        return self._stop.is_set() or self._closed.is_set()

    def _produce(self) -> None:
        try:
            for item in self._items:
                if not self._give((item,)):
                    return
        except BaseException as error:  # raised again in the thread that reads
            self._give(error)
        else:
            self._give(None)
        finally:
            # Here, not by the garbage collector: what a generator holds may belong to this thread.
            if isinstance(self._items, Generator):
                self._items.close()

    def _give(self, item: tuple[T] | BaseException | None) -> bool:
        while not self._over():
            try:
                self._ready.put(item, timeout=POLL_SECONDS)
            except Full:
                continue
            return True
        return False
