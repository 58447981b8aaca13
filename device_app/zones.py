"""Zones of the picture: what is inside, what comes and what goes.

An object is where its feet are, in the middle of its box's bottom edge (so for Frigate, and for
supervision's ``PolygonZone`` by default): the rest of a tall box covers what lies behind.
"""

from __future__ import annotations

import argparse
import difflib
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
import numpy.typing as npt

from ..models.detections import BoolArray, Detections, FloatArray
from ..models.draw import FONT, text_color
from ..models.errors import InputError
from ..models.preprocess import Image

INSIDE_S = 0.3
"""So long an object must have been seen inside before it counts."""
GONE_S = 1.0
"""So long it counts on while it is outside or not seen; the tracker remembers it as long."""
POINTS_MIN, POINTS_MAX = 3, 64
NAME_MAX = 40
AREA_MIN = 1e-4
"""Of the picture; what is smaller is a slip, and hardly ever hit by anybody's feet."""
RESERVED = "[]:,"
"""They divide the parts of a zone that is written as text."""
BELOW_1 = np.nextafter(np.float32(1), np.float32(0))
"""A zone that reaches the picture's edge has everything in it that stands at or beyond it."""
QUIET, BUSY, DARK = (230, 230, 230), (0, 190, 255), (0, 0, 0)
EXAMPLE = '"door: 0.1,0.2 0.5,0.2 0.5,0.9"'


@dataclass(frozen=True, eq=False)
class Zone:
    """A part of the picture, checked at birth and read-only after it.

    Attributes:
        name: 1 to 40 printable characters, none of ``[]:,``.
        polygon: float32 ``(n, 2)``, 3 to 64 points; x and y in 0..1 of the picture's width and
            height, in the order of its outline.
        classes: Names of the classes that count; None: all.

    Raises:
        InputError: One of them is not as said, edges cross, or the area is next to nothing.
    """

    name: str
    polygon: FloatArray
    classes: tuple[str, ...] | None = None
    _edges: tuple[FloatArray, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Checks everything, and prepares the edges for ``contains``."""
        _check_word("the zone's name", self.name)
        if self.classes is not None:
            for word in self.classes or ("",):
                _check_word(f"zone {self.name!r}: a class", word)
        given = np.array(self.polygon, dtype=np.float64)
        _check_polygon(f"zone {self.name!r}", given)
        polygon = given.astype(np.float32)
        polygon.setflags(write=False)
        object.__setattr__(self, "polygon", polygon)
        start, end = polygon, np.roll(polygon, -1, axis=0)
        rise = end[:, 1] - start[:, 1]
        # No line to the right crosses a level edge, so that its slope does not matter.
        slope = (end[:, 0] - start[:, 0]) / np.where(rise == 0, np.float32(1), rise)
        object.__setattr__(self, "_edges", (start[:, 0], start[:, 1], end[:, 1], slope))

    def __str__(self) -> str:
        """Returns the text that ``parse_zone`` reads as this zone."""
        classes = "" if self.classes is None else f"[{','.join(self.classes)}]"
        # NumPy's str: the shortest digits that are this float32 again.
        return f"{self.name}{classes}: " + " ".join(f"{x!s},{y!s}" for x, y in self.polygon)

    def contains(self, points: FloatArray) -> BoolArray:
        """Returns which points are inside: those from which a line to the right leaves it oddly.

        Args:
            points: float32 ``(k, 2)`` in 0..1. Of two zones that share an edge, one has it.
        """
        start_x, start_y, end_y, slope = self._edges
        x, y = points[:, :1], points[:, 1:]
        crossed = ((start_y > y) != (end_y > y)) & (x < start_x + (y - start_y) * slope)
        inside: BoolArray = crossed.sum(axis=1) % 2 == 1
        return inside


def parse_zone(text: str) -> Zone:
    """Returns the zone that a text describes: ``NAME: X,Y X,Y X,Y``; an argparse type.

    Classes that alone count stand behind the name: ``NAME[CLASS,CLASS]: X,Y X,Y X,Y``.

    Raises:
        argparse.ArgumentTypeError: The text is not like that, or no such zone can be.
    """
    head, colon, tail = text.partition(":")
    name, bracket, rest = head.partition("[")
    classes, closing, after = rest.partition("]")
    if not colon or (bracket and (not closing or after.strip())):
        message = f'expected a zone as {EXAMPLE} or "door[person,dog]: ...", found {text[:80]!r}'
        raise argparse.ArgumentTypeError(message)
    points = []
    for word in tail.split():
        x, _, y = word.partition(",")
        try:
            points.append((float(x), float(y)))
        except ValueError:
            message = (
                f"zone {name.strip()!r}: expected points x,y with spaces between them, found "
                f"{word[:80]!r}; write them as in {EXAMPLE}"
            )
            raise argparse.ArgumentTypeError(message) from None
    among = tuple(part.strip() for part in classes.split(",")) if bracket else None
    try:
        return Zone(name.strip(), np.array(points).reshape(-1, 2), among)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


@dataclass(frozen=True)
class Change:
    """An object came into a zone or left it.

    Attributes:
        kind: ``enter`` or ``leave``.
        zone: Name of the zone.
        label: Name of the object's class.
        track: The object's number.
        time_s: When it was first seen inside, or last, on the frames' clock; the change is known
            ``INSIDE_S`` or ``GONE_S`` later.
        xyxy: Where it was inside last: left, top, right, bottom in pixels of the source picture.
        score: Its score there.
        seconds: How long it was inside; None with ``enter``.
    """

    kind: str
    zone: str
    label: str
    track: int
    time_s: float
    xyxy: tuple[float, float, float, float]
    score: float
    seconds: float | None = None

    @property
    def text(self) -> str:
        """One line for people."""
        if self.seconds is None:
            return f"{self.label} #{self.track} came into {self.zone}"
        return f"{self.label} #{self.track} left {self.zone} after {self.seconds:.1f} s"


@dataclass
class _Stay:
    """One object in one zone; it is told once it counts."""

    first_s: float
    last_s: float = -math.inf
    xyxy: FloatArray = field(default_factory=lambda: np.zeros(4, np.float32))
    score: float = 0.0
    told: bool = False


class Zones:
    """All zones of a run, and who is in them.

    ``update`` and ``end`` belong to one thread; the rest is safe from any.

    Args:
        zones: Whose names differ.

    Raises:
        InputError: Two have the same name.
    """

    def __init__(self, zones: Sequence[Zone]) -> None:
        """Starts with nobody inside."""
        self.zones = tuple(zones)
        names = [zone.name for zone in self.zones]
        for name in (n for n in names if names.count(n) > 1):
            message = f"expected zones of different names, found two {name!r}; rename one"
            raise InputError(message)
        self._captions = [_caption(name, i) for i, name in enumerate(names, 1)]
        # By track and class: a model that was swapped in may use a number again.
        self._stays: list[dict[tuple[int, str], _Stay]] = [{} for _ in names]
        self._now_s = -math.inf
        self._counts: dict[str, dict[str, int]] = {name: {} for name in names}
        self._warned: tuple[tuple[str, ...], list[str]] | None = None

    def update(
        self,
        detections: Detections,
        classes: Sequence[str],
        size_wh: tuple[int, int],
        time_s: float,
    ) -> list[Change]:
        """Takes what was seen in one frame.

        Args:
            detections: In pixels of the picture; those without a track only count, while seen.
            classes: Names in the order of the labels.
            size_wh: Of the picture, in pixels.
            time_s: When the frame was taken; if it is earlier than the last, all start anew.

        Returns:
            Who came and who went.
        """
        changes = self.end() if time_s < self._now_s else []
        self._now_s = time_s
        names = [classes[i] if i < len(classes) else str(i) for i in detections.label.tolist()]
        tracks = [0] * len(names) if detections.track is None else detections.track.tolist()
        followed = set(zip(tracks, names, strict=True))
        feet = _feet(detections, size_wh)
        counts: dict[str, dict[str, int]] = {}
        for zone, stays in zip(self.zones, self._stays, strict=True):
            counted = counts[zone.name] = {}
            for row in np.flatnonzero(zone.contains(feet)).tolist() if names else ():
                name, key = names[row], (tracks[row], names[row])
                if zone.classes is not None and name not in zone.classes:
                    continue
                if not tracks[row]:
                    counted[name] = counted.get(name, 0) + 1
                    continue
                stay = stays.get(key) or stays.setdefault(key, _Stay(time_s))
                stay.last_s, stay.xyxy = time_s, detections.xyxy[row]
                stay.score = float(detections.score[row])
            for key, stay in list(stays.items()):
                if stay.last_s == time_s:
                    if not stay.told and time_s - stay.first_s >= INSIDE_S:
                        stay.told = True
                        changes.append(_change("enter", zone, key, stay))
                elif time_s - stay.last_s > GONE_S or (not stay.told and key in followed):
                    del stays[key]  # for long enough, or it only strayed in
                    if stay.told:
                        changes.append(_change("leave", zone, key, stay))
                    continue
                if stay.told:
                    counted[key[1]] = counted.get(key[1], 0) + 1
        self._counts = counts
        return changes

    def end(self) -> list[Change]:
        """Lets everybody leave: at the end of a run, or with another source or model."""
        changes = []
        for zone, stays in zip(self.zones, self._stays, strict=True):
            changes += [_change("leave", zone, key, s) for key, s in stays.items() if s.told]
            stays.clear()
        self._counts = {zone.name: {} for zone in self.zones}
        return changes

    def counts(self) -> dict[str, dict[str, int]]:
        """Returns the objects inside: zone -> class -> how many; not to be changed."""
        return self._counts

    def warnings(self, classes: Sequence[str]) -> list[str]:
        """Returns one line for each class that a zone asks for and the model does not know."""
        if self._warned is not None and self._warned[0] == tuple(classes):
            return list(self._warned[1])  # asked for with every look at the figures
        lines = []
        for zone in self.zones:
            for name in (n for n in zone.classes or () if n not in classes):
                near = difflib.get_close_matches(name, classes, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                lines.append(f"zone {zone.name!r}: the model knows no {name!r}{hint}")
        self._warned = (tuple(classes), lines)
        return lines[:]

    def draw(self, image: Image) -> None:
        """Draws the outlines with names and counts.

        Args:
            image: uint8 BGR ``(height, width, 3)`` of any size; changed in place.
        """
        height, width = image.shape[:2]
        scale = max(0.4, min(height, width) / 900)
        thick = max(1, round(scale * 3))
        counts, tops = self._counts, []
        last = np.array((width - 1, height - 1), np.float32)
        for zone in self.zones:
            outline = np.rint(zone.polygon * last).astype(np.int32)
            color = BUSY if counts[zone.name] else QUIET
            # A dark rim, so that the line is seen on snow as well as at night.
            cv2.polylines(image, [outline], True, DARK, thick + 2, cv2.LINE_AA)
            cv2.polylines(image, [outline], True, color, thick, cv2.LINE_AA)
            tops.append(outline[int(outline[:, 1].argmin())].tolist())
        for zone, caption, top in zip(self.zones, self._captions, tops, strict=True):
            number = sum(counts[zone.name].values())
            _draw_caption(image, caption, number, top, scale)


def _check_word(what: str, word: str) -> None:
    fits = 1 <= len(word) <= NAME_MAX and word.isprintable() and word == word.strip()
    if not fits or any(mark in word for mark in RESERVED):
        message = (
            f"{what}: expected 1 to {NAME_MAX} printable characters, none of {RESERVED} among "
            f"them, found {word[:80]!r}; write it as in {EXAMPLE}"
        )
        raise InputError(message)


def _check_polygon(zone: str, polygon: npt.NDArray[np.float64]) -> None:
    if polygon.shape[1:] != (2,) or not POINTS_MIN <= len(polygon) <= POINTS_MAX:
        message = (
            f"{zone}: expected {POINTS_MIN} to {POINTS_MAX} points x,y, found {len(polygon)}; "
            f"write them as in {EXAMPLE}"
        )
        raise InputError(message)
    outside = ~((polygon >= 0) & (polygon <= 1)).all(axis=1)
    if outside.any():
        x, y = polygon[int(outside.argmax())]
        message = (
            f"{zone}: expected x,y from 0 to 1, found {x:g},{y:g}; "
            "give parts of the picture's width and height, not pixels"
        )
        raise InputError(message)
    if (pair := _crossing(polygon)) is not None:
        message = (
            f"{zone}: expected edges that do not cross, found that those from points "
            f"{pair[0] + 1} and {pair[1] + 1} do; give the points in the order of the outline"
        )
        raise InputError(message)
    following = np.roll(polygon, -1, axis=0)
    doubled = polygon[:, 0] * following[:, 1] - polygon[:, 1] * following[:, 0]
    area = abs(float(doubled.sum())) / 2
    if area < AREA_MIN:
        message = (
            f"{zone}: expected at least {AREA_MIN:.2%} of the picture, found {area:.4%}; "
            "spread its points"
        )
        raise InputError(message)


def _crossing(polygon: npt.NDArray[np.float64]) -> tuple[int, int] | None:
    """Returns the places of two edges that cross; None if there are none."""
    points = [(float(x), float(y)) for x, y in polygon]
    edges = list(zip(points, points[1:] + points[:1], strict=True))

    def side(a: tuple[float, float], b: tuple[float, float], p: tuple[float, float]) -> float:
        return (b[0] - a[0]) * (p[1] - a[1]) - (b[1] - a[1]) * (p[0] - a[0])

    for i, (a, b) in enumerate(edges):
        for j, (c, d) in enumerate(edges[i + 2 :], i + 2):
            apart = side(a, b, c) * side(a, b, d) < 0
            if apart and side(c, d, a) * side(c, d, b) < 0:
                return i, j
    return None


def _feet(detections: Detections, size_wh: tuple[int, int]) -> FloatArray:
    """Returns float32 ``(n, 2)``: the middle of each bottom edge, in 0..1 of the picture."""
    xyxy = detections.xyxy
    feet = np.empty((len(xyxy), 2), np.float32)
    feet[:, 0] = (xyxy[:, 0] + xyxy[:, 2]) / np.float32(2 * size_wh[0])
    feet[:, 1] = xyxy[:, 3] / np.float32(size_wh[1])
    return np.clip(feet, np.float32(0), BELOW_1, out=feet)


def _change(kind: str, zone: Zone, key: tuple[int, str], stay: _Stay) -> Change:
    left, top, right, bottom = (round(float(v), 1) for v in stay.xyxy)
    leaves = kind == "leave"
    return Change(
        kind,
        zone.name,
        label=key[1],
        track=key[0],
        time_s=stay.last_s if leaves else stay.first_s,
        xyxy=(left, top, right, bottom),
        score=round(stay.score, 4),
        seconds=round(stay.last_s - stay.first_s, 3) if leaves else None,
    )


def _caption(name: str, number: int) -> str:
    """Returns the name in letters that OpenCV can draw."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().strip()
    return plain or f"zone {number}"


def _draw_caption(image: Image, name: str, number: int, top_xy: list[int], scale: float) -> None:
    """Draws name and number above a point, or below where there is no room."""
    height, width = image.shape[:2]
    color, text = BUSY if number else QUIET, f"{name}: {number}"
    (text_w, text_h), base = cv2.getTextSize(text, FONT, scale, 1)
    if text_w > width - 6:  # the number must stay, and letters that can be read
        text = f"{name[: max(0, int(len(text) * (width - 6) / text_w) - 6)]}: {number}"
        text_w = cv2.getTextSize(text, FONT, scale, 1)[0][0]
    box_h = text_h + base + 2
    x = min(max(0, top_xy[0]), max(0, width - text_w - 6))
    y = top_xy[1] - box_h if top_xy[1] >= box_h else min(top_xy[1], max(0, height - box_h))
    cv2.rectangle(image, (x, y), (x + text_w + 4, y + box_h), color, cv2.FILLED)
    ink = text_color(color)
    cv2.putText(image, text, (x + 2, y + text_h + 2), FONT, scale, ink, 1, cv2.LINE_AA)
