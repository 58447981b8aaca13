"""Which box is which from frame to frame: stable ids, and counts that do not flicker.

The association in two stages is that of ByteTrack (Zhang et al., arXiv 2110.06864): what is surely
seen is matched first, what is doubtful only continues tracks that exist. Pairs are taken greedily
by overlap, and a track moves on with its own speed while it is not seen; with a handful of objects
that finds what optimal assignment and a Kalman filter find.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from ..models.boxes import iou_matrix
from ..models.detections import Detections, FloatArray, IntArray

IOU_SURE = 0.25
"""Overlap with where a track should be, from which a sure box continues it."""
IOU_DOUBTFUL = 0.4
"""The same for a doubtful box, which has to lie better."""
DOUBTFUL = 0.5
"""A box is doubtful below the score that counts, down to so much of it."""
HITS_MIN = 3
"""A track counts once it was seen so often: what flashes up once is no object."""
FIRST_S = 0.3
"""Objects of a run's beginning count at once."""
KEEP_S = 1.0
"""So long a track is remembered that is not seen."""
COUNTED_S = 0.5
"""So long it is counted on."""
SPEED_GAIN = 0.4
"""Weight of the newest movement in a track's speed."""


@dataclass
class Track:
    """An object that is followed.

    Attributes:
        number: Its id, from 1; never used again in a run.
        label: Its class.
        xyxy: float32 ``(4,)``; where it was seen last, in pixels.
        speed: float32 ``(4,)``; of its edges, pixels per second.
        first_s: When it was seen first, and last, on the frames' clock in seconds.
        last_s: See ``first_s``.
        hits: Frames in which it was seen.
        confirmed: Whether it counts.
    """

    number: int
    label: int
    xyxy: FloatArray
    speed: FloatArray
    first_s: float
    last_s: float
    hits: int = 1
    confirmed: bool = False

    def at(self, time_s: float) -> FloatArray:
        """Returns where it should be at a time, in pixels."""
        moved: FloatArray = self.xyxy + self.speed * np.float32(time_s - self.last_s)
        return moved

    def seen(self, xyxy: FloatArray, time_s: float) -> None:
        """Continues the track."""
        passed = time_s - self.last_s
        if passed > 0:
            newest = (xyxy - self.xyxy) / np.float32(passed)
            gain = np.float32(SPEED_GAIN if self.hits > 1 else 1.0)
            self.speed = (1 - gain) * self.speed + gain * newest
        self.xyxy, self.last_s = xyxy, time_s
        self.hits += 1


class Tracker:
    """Follows the objects of one source.

    Args:
        score: From which a box counts; weaker ones only continue what is followed.
    """

    def __init__(self, score: float) -> None:
        """Starts with nothing."""
        self.score = score
        self.tracks: list[Track] = []
        self._numbers = 0
        self._started_s: float | None = None
        self._now_s = 0.0

    @property
    def floor(self) -> float:
        """Lowest score of boxes that it can use."""
        return DOUBTFUL * self.score

    def update(self, found: Detections, time_s: float) -> Detections:
        """Takes a frame's boxes.

        Args:
            found: Down to ``floor``.
            time_s: When the frame was taken; rises.

        Returns:
            All of them, with the number of each one's track; 0 while it does not count.
        """
        self._now_s = time_s
        if self._started_s is None:
            self._started_s = time_s
        self.tracks = [t for t in self.tracks if time_s - t.last_s <= KEEP_S]
        numbers = np.zeros(len(found), np.int64)
        free, taken = list(range(len(self.tracks))), set[int]()
        sure = np.flatnonzero(found.score >= self.score)
        doubtful = np.flatnonzero((found.score < self.score) & (found.score >= self.floor))
        for places, least in ((sure, IOU_SURE), (doubtful, IOU_DOUBTFUL)):
            for at, place in self._pairs(found, places, free, least, time_s):
                track = self.tracks[at]
                track.seen(found.xyxy[place], time_s)
                track.confirmed = track.confirmed or track.hits >= HITS_MIN
                numbers[place] = track.number if track.confirmed else 0
                free.remove(at)
                taken.add(place)
        early = time_s - self._started_s <= FIRST_S
        for place in (int(p) for p in sure if int(p) not in taken):
            self._numbers += 1
            still, box, label = np.zeros(4, np.float32), found.xyxy[place], int(found.label[place])
            track = Track(self._numbers, label, box, still, time_s, time_s, confirmed=early)
            self.tracks.append(track)
            numbers[place] = track.number if early else 0
        return found.with_tracks(numbers)

    def forget(self) -> None:
        """Forgets all objects, not their numbers: those of the next ones go on."""
        self.tracks = []

    def counts(self) -> Counter[int]:
        """Returns how many objects of each class are there: seen now, or a moment ago."""
        return Counter(t.label for t in self.present())

    def present(self) -> list[Track]:
        """Returns the tracks that count and were seen a moment ago."""
        return [t for t in self.tracks if t.confirmed and self._now_s - t.last_s <= COUNTED_S]

    def _pairs(
        self, found: Detections, places: IntArray, free: list[int], least: float, time_s: float
    ) -> list[tuple[int, int]]:
        """Returns pairs of a free track and a box of its class, the best overlap first."""
        if not free or not len(places):
            return []
        expected = np.stack([self.tracks[at].at(time_s) for at in free])
        overlap = iou_matrix(expected, found.xyxy[places])
        labels = np.array([self.tracks[at].label for at in free])
        overlap[labels[:, None] != found.label[places][None, :]] = 0
        pairs = []
        while overlap.size and overlap.max() >= least:
            row, column = np.unravel_index(int(overlap.argmax()), overlap.shape)
            pairs.append((free[int(row)], int(places[column])))
            overlap[row, :] = overlap[:, column] = 0
        return pairs
