"""The bounded look-ahead: order, bound, exceptions, and that no thread stays."""

import itertools
import threading
import time

import pytest

from bigbatch.errors import UserError
from bigbatch.training import prefetch
from bigbatch.training.prefetch import Prefetch


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("prefetch")]


@pytest.mark.parametrize("max_in_flight", [1, 2, 5, 100])
def test_items_come_in_the_order_of_the_requests(max_in_flight):
    with Prefetch(str, range(50), max_in_flight=max_in_flight) as items:
        assert list(items) == [str(i) for i in range(50)]
        assert next(items, None) is None
    assert threads() == []


def test_no_request_is_an_end_at_once():
    with Prefetch(str, [], max_in_flight=2) as items:
        assert list(items) == []


@pytest.mark.parametrize("max_in_flight", [1, 3])
def test_no_more_items_are_made_than_the_bound(max_in_flight):
    made, handed_out = 0, 0
    most_ahead = 0
    changed = threading.Semaphore(0)

    def produce(request):
        nonlocal made, most_ahead
        made += 1
        most_ahead = max(most_ahead, made - handed_out)
        changed.release()
        return request

    with Prefetch(produce, itertools.count(), max_in_flight=max_in_flight) as items:
        for _ in range(20):
            # Without a consumer the thread fills the look-ahead, and stops there.
            for _ in range(max_in_flight if handed_out == 0 else 1):
                assert changed.acquire(timeout=10)
            assert not changed.acquire(timeout=0.002)
            assert made - handed_out == max_in_flight
            handed_out += 1
            next(items)
    assert most_ahead == max_in_flight
    assert threads() == []


def test_late_requests_come_behind_the_others_and_within_the_bound():
    made = []

    def produce(request):
        made.append(request)
        return request

    with Prefetch(produce, range(2), max_in_flight=3) as items:
        items.request([2, 3, 4, 5])
        assert [next(items) for _ in range(2)] == [0, 1]
        assert list(items) == [2, 3, 4, 5]
        assert next(items, None) is None
        # As an adaptive policy does: one update's requests at a time, long after the others.
        for first in range(6, 3_000, 2):
            items.request(iter((first, first + 1)))
            assert next(items) == first
            assert next(items) == first + 1
        items.request(range(3_000, 3_100))
        assert next(items) == 3_000
    assert made == list(range(len(made)))
    assert len(made) <= 3_004
    assert threads() == []
    items.request([0])
    assert next(items, None) is None


def test_late_requests_after_an_exception_are_ignored():
    items = Prefetch(int, ["0", "one", "2"], max_in_flight=2)
    assert next(items) == 0
    with pytest.raises(ValueError, match="one"):
        next(items)
    items.request(["3"])
    assert next(items, None) is None
    assert threads() == []


def test_an_exception_comes_in_its_turn_and_ends_the_items():
    def produce(request):
        if request == 3:
            raise OSError("the disk is gone")
        return request

    items = Prefetch(produce, range(10), max_in_flight=2)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(items)
    assert threads() == []
    assert next(items, None) is None


def test_an_exception_in_the_requests_comes_in_its_turn():
    def requests():
        yield from range(3)
        raise OSError("no plan")

    items = Prefetch(str, requests(), max_in_flight=10)
    assert [next(items) for _ in range(3)] == ["0", "1", "2"]
    with pytest.raises(OSError, match="no plan"):
        next(items)
    assert threads() == []


def test_a_producer_that_raises_stop_iteration_does_not_look_like_the_end():
    with (
        Prefetch(lambda _: next(iter(())), range(3), max_in_flight=2) as items,
        pytest.raises(RuntimeError, match="raised StopIteration"),
    ):
        next(items)
    assert threads() == []


def test_closing_drops_what_was_not_begun_and_waits_for_what_was():
    begun, go_on, finished = threading.Event(), threading.Event(), []

    def produce(request):
        begun.set()
        assert go_on.wait(10)
        finished.append(request)

    items = Prefetch(produce, itertools.count(), max_in_flight=4)
    assert begun.wait(10)
    threading.Timer(0.05, go_on.set).start()
    items.close()
    assert finished == [0]
    assert threads() == []
    items.close()
    assert next(items, None) is None


def test_leaving_the_context_by_an_exception_closes():
    def fail():
        with Prefetch(str, itertools.count(), max_in_flight=2) as items:
            raise KeyError(next(items))

    with pytest.raises(KeyError):
        fail()
    assert threads() == []


def test_a_prefetch_that_is_dropped_leaves_no_thread():
    items = Prefetch(str, itertools.count(), max_in_flight=2)
    next(items)
    del items
    deadline_s = time.monotonic() + 10
    while threads() and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert threads() == []


def test_waited_seconds_are_those_of_the_consumer(monkeypatch):
    now_s = 100.0
    consumer_waits = threading.Event()

    def clock():
        consumer_waits.set()
        return now_s

    def produce(request):
        nonlocal now_s
        if request == 0:
            assert consumer_waits.wait(10)
            # The consumer has read the clock and waits while this takes 5 seconds.
            now_s += 5.0
        return request

    monkeypatch.setattr(prefetch.time, "monotonic", clock)
    with Prefetch(produce, range(3), max_in_flight=3) as items:
        assert items.waited_s == 0.0
        next(items)
        assert items.waited_s == 5.0
        now_s += 7.0  # The consumer's own work is not counted.
        assert list(items) == [1, 2]
        assert items.waited_s == 5.0


@pytest.mark.parametrize("max_in_flight", [0, -1])
def test_a_look_ahead_of_nothing_is_the_users_error(max_in_flight):
    with pytest.raises(UserError) as error:
        Prefetch(str, range(3), max_in_flight=max_in_flight)
    (problem,) = error.value.problems
    assert (problem.field, problem.nearest) == ("max_in_flight", 1)
