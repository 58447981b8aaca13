"""The hand-over between two threads: one slot that holds the newest item."""

from __future__ import annotations

import threading
import time
from typing import Generic, TypeVar

T = TypeVar("T")


class Latest(Generic[T]):
    """One slot between a producer and a consumer.

    Normally ``put`` never waits: an item that nobody took is replaced by the newer one and counted
    as dropped, so that a slow consumer never sees an old frame. With ``lossless`` the producer
    waits until the slot is free, and nothing is dropped: right for files, wrong for cameras.

    Args:
        lossless: Whether the producer waits for the consumer.
    """

    def __init__(self, lossless: bool = False) -> None:
        """Starts empty and open."""
        self.lossless = lossless
        self._condition = threading.Condition()
        self._item: T | None = None
        self._closed = False
        self._dropped = 0

    @property
    def dropped(self) -> int:
        """Items that were replaced before anybody took them."""
        return self._dropped

    @property
    def closed(self) -> bool:
        """Whether no further item can come in."""
        return self._closed

    def put(self, item: T) -> bool:
        """Hands an item over; waits for a free slot only if ``lossless``.

        Returns:
            False if the hand-over is closed: the producer should end.
        """
        with self._condition:
            while self.lossless and self._item is not None and not self._closed:
                self._condition.wait()
            if self._closed:
                return False
            if self._item is not None:
                self._dropped += 1
            self._item = item
            self._condition.notify_all()
            return True

    def get(self, timeout_s: float | None = None) -> T | None:
        """Takes the item out, waiting for one.

        Args:
            timeout_s: Seconds to wait at most; for ever by default.

        Returns:
            The item; None after the time, or when the hand-over is closed and empty.
        """
        until = None if timeout_s is None else time.monotonic() + timeout_s
        with self._condition:
            while self._item is None and not self._closed:
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    return None
                self._condition.wait(left)
            item, self._item = self._item, None
            self._condition.notify_all()
            return item

    def close(self, discard: bool = False) -> None:
        """Lets nothing in any more and wakes both sides.

        Args:
            discard: Whether an item that waits in the slot is thrown away, too; otherwise the
                consumer still gets it.
        """
        with self._condition:
            self._closed = True
            if discard:
                self._item = None
            self._condition.notify_all()
