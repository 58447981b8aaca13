"""Zones: what is inside, who comes and goes, and what is refused."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import pytest
from edgesight.device_app.tracking import Tracker
from edgesight.device_app.zones import (
    BUSY,
    GONE_S,
    INSIDE_S,
    QUIET,
    Change,
    Zone,
    Zones,
    parse_zone,
)
from edgesight.models.detections import Detections
from edgesight.models.errors import InputError

CLASSES = ("person", "dog", "car")
WH = (200, 100)
FPS = 10.0
LEFT = "left: 0,0 0.5,0 0.5,1 0,1"
RIGHT = "right: 0.5,0 1,0 1,1 0.5,1"


def seen(*rows: tuple[float, float, int, int], followed: bool = True) -> Detections:
    """Boxes of 20 x 40 px from ``(feet x, feet y, label, track)`` in pixels."""
    xyxy = np.array([[x - 10, y - 40, x + 10, y] for x, y, _, _ in rows], np.float32)
    score = np.full(len(rows), 0.75, np.float32)
    label = np.array([row[2] for row in rows], np.int64)
    track = np.array([row[3] for row in rows], np.int64) if followed else None
    return Detections(xyxy.reshape(-1, 4), score, label, track)


def walk(zones: Zones, frames: list[Detections], first: int = 0) -> list[Change]:
    """Shows the frames at ``FPS``; returns all changes."""
    return [
        change
        for i, found in enumerate(frames, first)
        for change in zones.update(found, CLASSES, WH, i / FPS)
    ]


def square(name: str = "here", classes: tuple[str, ...] | None = None) -> Zone:
    corners = np.array([[0.25, 0.25], [0.75, 0.25], [0.75, 0.75], [0.25, 0.75]])
    return Zone(name, corners, classes)


INSIDE = (100.0, 50.0, 0, 7)
OUTSIDE = (20.0, 20.0, 0, 7)


def test_text_becomes_a_zone_and_a_zone_the_same_text() -> None:
    zone = parse_zone("  Tür 1 [person, hot dog]:0.1,0.2  0.5,.2\t0.5,9e-1 ")
    assert (zone.name, zone.classes) == ("Tür 1", ("person", "hot dog"))
    assert zone.polygon.dtype == np.float32
    assert zone.polygon.tolist() == np.float32([[0.1, 0.2], [0.5, 0.2], [0.5, 0.9]]).tolist()
    assert str(zone) == "Tür 1[person,hot dog]: 0.1,0.2 0.5,0.2 0.5,0.9"
    odd = Zone("odd", np.random.default_rng(0).random((3, 2)))
    again = parse_zone(str(odd))
    assert again.classes is None
    assert (again.polygon == odd.polygon).all()
    with pytest.raises(ValueError, match="read-only"):
        zone.polygon[0] = 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected a zone as"),
        ("door 0,0 1,0 1,1", "expected a zone as"),
        ("door[person: 0,0 1,0 1,1", "expected a zone as"),
        ("door[person]x: 0,0 1,0 1,1", "expected a zone as"),
        (": 0,0 1,0 1,1", "the zone's name: expected 1 to 40 printable characters"),
        ("x" * 41 + ": 0,0 1,0 1,1", "the zone's name: expected 1 to 40"),
        ("a\x1b[2J: 0,0 1,0 1,1", "expected a zone as"),
        ("a\x07b: 0,0 1,0 1,1", "expected 1 to 40 printable characters"),
        ("a]b: 0,0 1,0 1,1", "none of []:, among them, found 'a]b'"),
        ("door[]: 0,0 1,0 1,1", "zone 'door': a class: expected 1 to 40"),
        ("door[dog,]: 0,0 1,0 1,1", "zone 'door': a class: expected 1 to 40"),
        ("door:", "expected 3 to 64 points x,y, found 0"),
        ("door: 0,0 1,1", "expected 3 to 64 points x,y, found 2"),
        ("door: " + "0,0 1,0 1,1 " * 22, "expected 3 to 64 points x,y, found 66"),
        ("door: 0,0 1 1,1", "expected points x,y with spaces between them, found '1'"),
        ("door: 0,0 1,0,1 1,1", "found '1,0,1'"),
        ("door: 0,0 640,0 640,480", "expected x,y from 0 to 1, found 640,0; give parts"),
        ("door: 0,0 1,-0.1 1,1", "found 1,-0.1"),
        ("door: 0,0 1,0 nan,1", "found nan,1"),
        ("door: 0,0 1,0 1e300,1", "found 1e+300,1"),
        ("door: 0,0 0.5,0.5 1,1", "expected at least 0.01% of the picture, found 0.0000%"),
        ("door: 0,0 0.01,0 0.01,0.01", "expected at least 0.01% of the picture, found 0.0050%"),
        ("door: 0,0 1,1 1,0 0,1", "those from points 1 and 3 do"),
    ],
)
def test_what_is_no_zone_is_one_clear_line(text: str, words: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        parse_zone(text)
    told = str(caught.value)
    assert words in told
    assert "\n" not in told
    assert len(told) < 300


def test_a_zone_is_checked_without_text_too() -> None:
    with pytest.raises(InputError, match="points x,y"):
        Zone("door", np.zeros((4, 3)))
    with pytest.raises(InputError, match="found 'a:b'"):
        Zone("a:b", square().polygon)
    with pytest.raises(InputError, match="a class"):
        square(classes=())


def test_as_a_repeatable_option(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--zone", type=parse_zone, action="append")
    found = parser.parse_args(["--zone", LEFT, "--zone", RIGHT]).zone
    assert [zone.name for zone in found] == ["left", "right"]
    with pytest.raises(SystemExit):
        parser.parse_args(["--zone", "door: 0,0 5,5 1,0"])
    assert "argument --zone: zone 'door': expected x,y from 0 to 1" in capsys.readouterr().err


def test_two_of_one_name_are_refused() -> None:
    with pytest.raises(InputError, match="different names, found two 'here'"):
        Zones([square(), parse_zone(LEFT), square()])


def test_points_of_a_concave_zone_against_counting_pixels() -> None:
    """An L, compared with a picture of it that OpenCV has filled."""
    import cv2

    corners = np.array([[0, 0], [0.25, 0], [0.25, 0.5], [1, 0.75], [1, 1], [0, 1]])
    picture = np.zeros((400, 400), np.uint8)
    cv2.fillPoly(picture, [np.rint(corners * 400).astype(np.int32)], 1)
    points = np.random.default_rng(3).random((2000, 2)).astype(np.float32)
    found = Zone("L", corners).contains(points)
    wanted = picture[(points[:, 1] * 400).astype(int), (points[:, 0] * 400).astype(int)] > 0
    assert 0.3 < found.mean() < 0.7
    assert (found != wanted).mean() < 0.01, "but for pixels on the edge"


def test_an_object_is_where_its_feet_are() -> None:
    zones = Zones([square()])
    box = np.array([[80, 10, 120, 70]], np.float32)  # middle (100, 40), feet (100, 70)
    above = np.array([[80, 20, 120, 80]], np.float32)  # its middle inside, its feet below
    for xyxy, number in ((box, 1), (above, 0)):
        found = Detections(xyxy, np.array([0.9], np.float32), np.array([1]))
        zones.update(found, CLASSES, WH, 0.0)
        assert sum(zones.counts()["here"].values()) == number


def test_zones_side_by_side_share_nobody_and_miss_nobody() -> None:
    zones = Zones([parse_zone(LEFT), parse_zone(RIGHT)])
    on_edges = [(x, y, 1, 0) for x in (-9.0, 0.0, 100.0, 200.0, 230.0) for y in (0.0, 100.0, 120.0)]
    zones.update(seen(*on_edges), CLASSES, WH, 0.0)
    assert zones.counts() == {"left": {"dog": 6}, "right": {"dog": 9}}


def test_comes_after_a_moment_and_leaves_later_with_its_seconds() -> None:
    zones = Zones([square()])
    frames = [seen(OUTSIDE)] * 5 + [seen(INSIDE)] * 20 + [seen(OUTSIDE)] * 20
    changes = walk(zones, frames)
    assert [c.kind for c in changes] == ["enter", "leave"]
    enter, leave = changes
    assert (enter.zone, enter.label, enter.track, enter.seconds) == ("here", "person", 7, None)
    assert enter.time_s == 0.5
    assert enter.xyxy == (90.0, 10.0, 110.0, 50.0)
    assert enter.score == 0.75
    assert (leave.time_s, leave.seconds) == (2.4, pytest.approx(1.9))
    assert leave.text == "person #7 left here after 1.9 s"
    assert enter.text == "person #7 came into here"


def test_counts_from_the_moment_it_is_told_until_it_is_gone() -> None:
    zones, counted, told = Zones([square()]), [], []
    for i in range(40):
        found = seen(INSIDE) if 5 <= i < 15 else seen(OUTSIDE) if i < 5 else seen()
        told += [(i, c.kind) for c in zones.update(found, CLASSES, WH, i / FPS)]
        counted.append(zones.counts()["here"].get("person", 0))
    (first, _), (last, _) = told
    assert first / FPS == pytest.approx(0.5 + INSIDE_S, abs=1.5 / FPS)
    assert last / FPS == pytest.approx(1.4 + GONE_S, abs=1.5 / FPS)
    assert counted == [0] * first + [1] * (last - first) + [0] * (40 - last)


def test_flickering_at_the_edge_and_being_hidden_is_one_stay() -> None:
    zones = Zones([square()])
    frames = [seen(INSIDE)] * 5
    frames += [seen(OUTSIDE) if i % 3 else seen(INSIDE) for i in range(30)]
    frames += [seen()] * 6 + [seen(INSIDE)] * 5
    assert [c.kind for c in walk(zones, frames)] == ["enter"]


def test_who_only_strays_in_does_not_come() -> None:
    zones = Zones([square()])
    assert walk(zones, ([seen(INSIDE)] * 2 + [seen(OUTSIDE)]) * 20) == []
    assert zones.counts() == {"here": {}}


def test_a_camera_of_two_frames_a_second_tells_as_well() -> None:
    zones = Zones([square()])
    times = [zones.update(seen(INSIDE), CLASSES, WH, i * 0.5) for i in range(4)]
    assert [len(changes) for changes in times] == [0, 1, 0, 0]


@pytest.mark.parametrize("followed", [True, False])
def test_who_is_not_followed_counts_and_tells_nothing(followed: bool) -> None:
    zones = Zones([square()])
    nobody = (100.0, 50.0, 1, 0)
    assert walk(zones, [seen(nobody, nobody, followed=followed)] * 30) == []
    assert zones.counts() == {"here": {"dog": 2}}
    walk(zones, [seen()], 30)
    assert zones.counts() == {"here": {}}


def test_only_the_classes_that_are_asked_for() -> None:
    zones = Zones([square("dogs", ("dog",)), square("all")])
    frames = [seen((90.0, 50.0, 0, 1), (100.0, 50.0, 1, 2), (110.0, 50.0, 9, 3))] * 6
    changes = walk(zones, frames)
    assert {(c.zone, c.label) for c in changes} == {
        ("dogs", "dog"),
        ("all", "person"),
        ("all", "dog"),
        ("all", "9"),
    }
    assert zones.counts() == {"dogs": {"dog": 1}, "all": {"person": 1, "dog": 1, "9": 1}}


def test_a_class_that_the_model_does_not_know_is_a_warning() -> None:
    zones = Zones([square("dogs", ("dog", "persn")), square("all")])
    assert zones.warnings(CLASSES) == [
        "zone 'dogs': the model knows no 'persn'; did you mean 'person'?"
    ]
    assert len(zones.warnings(("tile",))) == 2
    assert zones.warnings(("dog", "persn")) == []


def test_a_swapped_model_lets_the_old_objects_leave() -> None:
    zones = Zones([square()])
    assert len(walk(zones, [seen(INSIDE)] * 6)) == 1
    changes = []
    for i in range(6, 30):  # another model, other names, with the same number and a higher one
        found = seen((100.0, 50.0, 1, 7), (110.0, 50.0, 0, 8))
        changes += zones.update(found, ("tile", "crack"), WH, i / FPS)
    assert [(c.kind, c.label, c.track) for c in changes] == [
        ("enter", "crack", 7),
        ("enter", "tile", 8),
        ("leave", "person", 7),
    ]
    assert zones.counts() == {"here": {"crack": 1, "tile": 1}}


def test_the_end_and_a_clock_that_starts_anew_let_everybody_leave() -> None:
    zones = Zones([square()])
    walk(zones, [seen(INSIDE)] * 11, first=100)
    assert [(c.kind, c.seconds) for c in walk(zones, [seen(INSIDE)] * 6)] == [
        ("leave", pytest.approx(1.0)),
        ("enter", None),
    ]
    assert [c.kind for c in zones.end()] == ["leave"]
    assert zones.end() == []
    assert zones.counts() == {"here": {}}


def test_memory_does_not_grow_with_objects_that_have_gone() -> None:
    zones = Zones([square()])
    changes: list[Any] = []
    for i in range(3000):
        changes += zones.update(seen((100.0, 50.0, 0, 1 + i // 6)), CLASSES, WH, i / FPS)
    assert len(changes) > 900
    assert sum(len(stays) for stays in zones._stays) <= 4


def test_with_the_real_tracker() -> None:
    """One walks through a zone, hidden for a moment: it comes once and leaves once."""
    tracker, zones, changes = Tracker(0.4), Zones([square()]), []
    for i in range(80):
        hidden = 30 <= i < 34
        found = seen() if hidden else seen((4.0 + 2.5 * i, 60.0, 0, 0))
        followed = tracker.update(found, i / 15)
        changes += zones.update(followed, CLASSES, WH, i / 15)
    assert [(c.kind, c.track) for c in changes] == [("enter", 1), ("leave", 1)]
    assert changes[1].seconds == pytest.approx(100 / 2.5 / 15, abs=0.2)


@pytest.mark.parametrize("size", [(480, 640), (1080, 1920), (240, 320)])
def test_outline_name_and_count_are_drawn_in_place(size: tuple[int, int]) -> None:
    zones = Zones([square("Tür"), parse_zone("門: 0,0 1,0 1,1 0,1")])
    height, width = size
    for people, color in ((0, QUIET), (2, BUSY)):
        zones.update(seen(*[(100.0, 50.0, 0, 0)] * people), CLASSES, WH, 0.0)
        image = np.full((*size, 3), 90, np.uint8)
        zones.draw(image)
        edge = image[height // 2, round(0.25 * (width - 1))].astype(int)
        assert np.abs(edge - color).max() < 45, "a thin line is blended a little"
        assert (image[height // 2, width // 2] == 90).all(), "the inside stays as it was"


def test_a_picture_smaller_than_its_captions_is_no_error() -> None:
    for side in (1, 2, 16):
        Zones([square("x" * 40)]).draw(np.full((side, side, 3), 90, np.uint8))


def test_nothing_is_drawn_for_no_zones() -> None:
    image = np.full((100, 100, 3), 90, np.uint8)
    Zones([]).draw(image)
    assert (image == 90).all()


def test_a_long_name_fits_and_its_count_is_to_be_seen() -> None:
    zones, pictures = Zones([square("x" * 40)]), []
    for number in (1, 8):
        zones.update(seen(*[(100.0, 50.0, 0, 0)] * number), CLASSES, WH, 0.0)
        image = np.full((120, 160, 3), 90, np.uint8)
        zones.draw(image)
        assert (image[:, -1] == 90).all(), "the caption ends before the picture does"
        pictures.append(image)
    assert (pictures[0] != pictures[1]).sum() > 3
