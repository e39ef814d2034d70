"""A bounded look-ahead: the next microbatches are made while the device computes."""

import collections
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

from bigbatch.errors import Problem, UserError

Request = TypeVar("Request")
Item = TypeVar("Item")


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
        self._pending: collections.deque[Future[Item]] = collections.deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._late: collections.deque[Request] = collections.deque()
        self._closed = False
        self._fill()

    def request(self, requests: Iterable[Request]) -> None:
        """Adds requests behind those that are known, and begins to make them if there is room.

        Any number may wait: only the items are bounded. After an exception or `close` they are
        ignored.
        """
        self._late.extend(requests)
        self._fill()

    def __next__(self) -> Item:
        if not self._pending:
            raise StopIteration
        began_s = time.monotonic()
        try:
            item = self._pending.popleft().result()
        except StopIteration as error:
            # Else it would look like the end of the items.
            self.close()
            raise RuntimeError("the producer of a prefetch raised StopIteration") from error
        except BaseException:
            self.close()
            raise
        finally:
            self.waited_s += time.monotonic() - began_s
        self._fill()
        return item

    def close(self) -> None:
        """Drop what is pending and wait for the thread to end. May be called again."""
        self._closed = True
        self._pending.clear()
        self._thread.shutdown(wait=True, cancel_futures=True)

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
        while len(self._pending) < self._max_in_flight and not self._closed:
            try:
                request = next(self._requests)
            except StopIteration:
                if not self._late:
                    return
                request = self._late.popleft()
            except Exception as error:
                # It takes its turn behind the items whose requests came before it.
                self._requests = iter(())
                failed: Future[Item] = Future()
                failed.set_exception(error)
                self._pending.append(failed)
                return
            self._pending.append(self._thread.submit(self._produce, request))
