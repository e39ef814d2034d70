"""A bounded look-ahead: the next microbatches are made while the device computes."""

import collections
import contextlib
import functools
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Generic, Never, Self, TypeAlias, TypeVar

from bigbatch.errors import Problem, UserError

Request = TypeVar("Request")
Item = TypeVar("Item")
# What to call for the next item; None: nothing more comes.
_ToMake: TypeAlias = queue.SimpleQueue[Callable[[], Any] | None]
_Made: TypeAlias = queue.SimpleQueue[tuple[Any, BaseException | None]]


class Prefetch(Iterator[Item], Generic[Request, Item]):
    """`map(produce, requests)`, at most `max_in_flight` items ahead, in the order of the requests.

    The items are made in one other thread, from the moment of construction on. An exception in
    `produce` or `requests` is raised where its item would have come, and ends the iteration. Use it
    as a context manager, or close it: no thread is left behind, and what was begun is waited for.

    Requests that become known late are added by `request`. The iteration ends where nothing more is
    requested, and goes on when something is.

    Host memory holds at most `max_in_flight` items beside the one that was handed out.

    Attributes:
      waited_s: seconds for which the consumer has waited for items so far.

    >>> with Prefetch(lambda x: x * x, range(4), max_in_flight=2) as squares:
    ...     list(squares)
    ...     squares.request([5, 6])
    ...     list(squares)
    [0, 1, 4, 9]
    [25, 36]
    """

    def __init__(
        self,
        produce: Callable[[Request], Item],
        requests: Iterable[Request] = (),
        *,
        max_in_flight: int,
    ):
        """Start to make the first items.

        Args:
          produce: makes one item from one request, in the other thread.
          requests: what to make, drawn in the consumer's thread up to `max_in_flight` ahead; may
            be endless.
          max_in_flight: how many items may be in the making or waiting, at least 1.

        Raises:
          UserError: max_in_flight is below 1.
        """
        if max_in_flight < 1:
            raise UserError(Problem("max_in_flight", max_in_flight, "a number of at least 1", 1))
        self.waited_s = 0.0
        self._produce = produce
        self._requests: Iterator[Request] = iter(requests)
        self._max_in_flight = max_in_flight
        self._in_flight = 0
        self._late: collections.deque[Request] = collections.deque()
        self._closed = False
        # Two queues cost a quarter of what a `Future` for each item does, which shows beside a
        # small item.
        self._to_make: _ToMake = queue.SimpleQueue()
        self._made: _Made = queue.SimpleQueue()
        queues = self._to_make, self._made
        self._thread = threading.Thread(target=_make, args=queues, name="prefetch", daemon=True)
        self._thread.start()
        # The thread does not know of this object, so one that is dropped is ended too.
        weakref.finalize(self, self._to_make.put, None)
        self._fill()

    def request(self, requests: Iterable[Request]) -> None:
        """Adds requests behind those that are known, and begins to make them if there is room.

        Any number may wait: only the items are bounded. After an exception or `close` they are
        ignored.
        """
        self._late.extend(requests)
        self._fill()

    def __next__(self) -> Item:
        if not self._in_flight:
            raise StopIteration
        began_s = time.monotonic()
        try:
            item, error = self._made.get()
        finally:
            self.waited_s += time.monotonic() - began_s
        self._in_flight -= 1
        if error is not None:
            self.close()
            if isinstance(error, StopIteration):
                # Else it would look like the end of the items.
                raise RuntimeError("the producer of a prefetch raised StopIteration") from error
            raise error
        self._fill()
        return item

    def close(self) -> None:
        """Drop what is pending and wait for the thread to end. May be called again."""
        self._closed = True
        self._in_flight = 0
        with contextlib.suppress(queue.Empty):
            while True:
                self._to_make.get_nowait()
        self._to_make.put(None)
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _fill(self) -> None:
        while self._in_flight < self._max_in_flight and not self._closed:
            call = self._next_call()
            if call is None:
                return
            self._to_make.put(call)
            self._in_flight += 1

    def _next_call(self) -> Callable[[], Item] | None:
        """What makes the next item; None where nothing is requested."""
        try:
            return functools.partial(self._produce, next(self._requests))
        except StopIteration:
            return functools.partial(self._produce, self._late.popleft()) if self._late else None
        except Exception as error:
            # It takes its turn behind the items whose requests came before it.
            self._requests = iter(())
            return functools.partial(_raise, error)


def _make(to_make: _ToMake, made: _Made) -> None:
    """What the thread does."""
    while (produce := to_make.get()) is not None:
        try:
            made.put((produce(), None))
        except BaseException as error:
            made.put((None, error))


def _raise(error: Exception) -> Never:
    raise error
