"""The one-slot hand-over: newest wins and drops are counted, or nothing is dropped."""

from __future__ import annotations

import threading
import time

import pytest
from edgesight.device_app.latest import Latest


def test_newest_item_wins_and_the_others_count_as_dropped() -> None:
    slot: Latest[int] = Latest()
    assert [slot.put(i) for i in range(5)] == [True] * 5
    assert slot.get() == 4
    assert slot.dropped == 4
    slot.put(5)
    assert slot.get() == 5
    assert slot.dropped == 4


def test_get_waits_for_an_item() -> None:
    slot: Latest[str] = Latest()
    threading.Timer(0.05, slot.put, ("late",)).start()
    assert slot.get(10) == "late"


def test_get_gives_none_after_its_time() -> None:
    slot: Latest[str] = Latest()
    began = time.monotonic()
    assert slot.get(0.05) is None
    assert time.monotonic() - began >= 0.05


def test_lossless_producer_waits_and_every_item_arrives_in_order() -> None:
    slot: Latest[int] = Latest(lossless=True)

    def produce() -> None:
        for i in range(200):
            slot.put(i)
        slot.close()

    producer = threading.Thread(target=produce)
    producer.start()
    got = []
    while (item := slot.get(10)) is not None:
        got.append(item)
        if item % 50 == 0:
            time.sleep(0.01)
    producer.join(10)
    assert got == list(range(200))
    assert slot.dropped == 0


def test_slow_consumer_sees_rising_items_and_nothing_is_lost_uncounted() -> None:
    slot: Latest[int] = Latest()

    def produce() -> None:
        for i in range(2000):
            slot.put(i)
        slot.close()

    producer = threading.Thread(target=produce)
    producer.start()
    got = []
    while (item := slot.get(10)) is not None:
        got.append(item)
        time.sleep(0.001)
    producer.join(10)
    assert got == sorted(got)
    assert got[-1] == 1999, "the last item must arrive although the producer closed"
    assert len(got) + slot.dropped == 2000


@pytest.mark.parametrize("lossless", [False, True])
def test_closed_takes_nothing_and_still_gives_what_was_inside(lossless: bool) -> None:
    slot: Latest[int] = Latest(lossless)
    slot.put(1)
    slot.close()
    assert slot.closed
    assert not slot.put(2)
    assert slot.get() == 1
    assert slot.get() is None


def test_discard_throws_away_what_was_inside() -> None:
    slot: Latest[int] = Latest()
    slot.put(1)
    slot.close(discard=True)
    assert slot.get() is None


def test_close_wakes_a_waiting_producer_and_a_waiting_consumer() -> None:
    full: Latest[int] = Latest(lossless=True)
    full.put(1)
    empty: Latest[int] = Latest()
    answers: list[object] = []
    waiting = [
        threading.Thread(target=lambda: answers.append(full.put(2))),
        threading.Thread(target=lambda: answers.append(empty.get())),
    ]
    for thread in waiting:
        thread.start()
    time.sleep(0.05)
    assert answers == []
    full.close()
    empty.close()
    for thread in waiting:
        thread.join(10)
    assert sorted(map(str, answers)) == ["False", "None"]
