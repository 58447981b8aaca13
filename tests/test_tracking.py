"""Objects keep their ids while they move, hide and cross; counts do not flicker."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from edgesight.__main__ import main
from edgesight.device_app.tracking import KEEP_S, Tracker
from edgesight.models.detections import Detections

kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("app_kit.py"))))
SCORE = 0.4
FPS = 15.0


def boxes(*rows: tuple[float, float, float, int]) -> Detections:
    """Boxes of 40 x 80 px from ``(left, top, score, label)``."""
    xyxy = np.array([[x, y, x + 40, y + 80] for x, y, _, _ in rows], np.float32).reshape(-1, 4)
    score = np.array([row[2] for row in rows], np.float32)
    return Detections(xyxy, score, np.array([row[3] for row in rows], np.int64))


def ids(found: Detections) -> list[int]:
    assert found.track is not None
    return found.track.tolist()


def test_two_that_cross_keep_their_ids() -> None:
    tracker, seen = Tracker(SCORE), []
    for i in range(40):
        left, right = 20 + 8 * i, 340 - 8 * i
        seen.append(ids(tracker.update(boxes((left, 50, 0.8, 0), (right, 95, 0.7, 0)), i / FPS)))
    assert all(pair == [1, 2] for pair in seen)
    assert tracker.counts() == {0: 2}


def test_one_that_flickers_is_one_and_is_counted_all_the_time() -> None:
    tracker, counts, numbers = Tracker(SCORE), [], set()
    for i in range(60):
        found = boxes((100 + 2 * i, 50, 0.8, 3)) if i % 4 else boxes()
        numbers |= set(ids(tracker.update(found, i / FPS)))
        if i > 2:
            counts.append(tracker.counts()[3])
    assert numbers == {1}
    assert set(counts) == {1}


def test_a_doubtful_box_continues_a_track_and_begins_none() -> None:
    tracker = Tracker(SCORE)
    for i in range(5):
        tracker.update(boxes((100, 50, 0.8, 0)), i / FPS)
    for i in range(5, 40):
        weak = tracker.update(boxes((100, 50, 0.25, 0), (300, 50, 0.3, 0)), i / FPS)
        assert ids(weak) == [1, 0]
    assert len(tracker.tracks) == 1


def test_what_flashes_up_for_two_frames_is_never_counted() -> None:
    tracker = Tracker(SCORE)
    tracker.update(boxes(), 0.0)
    for i in range(10, 60):
        found = boxes((200, 50, 0.9, 1)) if i % 20 < 2 else boxes()
        assert set(ids(tracker.update(found, i / FPS))) <= {0}
        assert not tracker.counts()


def test_one_that_walks_on_behind_a_pillar_is_the_same_and_one_that_comes_later_is_not() -> None:
    tracker = Tracker(SCORE)
    for i in range(30):
        hidden = 12 <= i < 22
        found = boxes() if hidden else boxes((20 + 10 * i, 50, 0.9, 0))
        tracker.update(found, i / FPS)
    assert {t.number for t in tracker.tracks} == {1}
    late = 30 / FPS + KEEP_S + 0.1
    for i in range(4):
        found = tracker.update(boxes((320, 50, 0.9, 0)), late + i / FPS)
    assert ids(found) == [2], "an id is never used again"


def test_another_class_in_the_same_place_is_another_object() -> None:
    tracker = Tracker(SCORE)
    for i in range(5):
        tracker.update(boxes((100, 50, 0.8, 0)), i / FPS)
    for i in range(5, 10):
        found = tracker.update(boxes((100, 50, 0.8, 1)), i / FPS)
    assert ids(found) == [2]


def test_frames_that_come_slowly_or_twice_at_a_time() -> None:
    tracker = Tracker(SCORE)
    for i in range(8):
        found = tracker.update(boxes((100 + 5 * i, 50, 0.8, 0)), i * 0.8)
    assert ids(found) == [1]
    assert ids(tracker.update(boxes((136, 50, 0.8, 0)), 7 * 0.8)) == [1], "no division by no time"


def test_hundreds_of_boxes_and_none() -> None:
    n, rng = 300, np.random.default_rng(0)
    tracker = Tracker(SCORE)
    for i in range(5):
        rows = [(float(x), float(y), 0.9, 0) for x, y in rng.uniform(0, 4000, (n, 2))]
        found = tracker.update(boxes(*rows), i / FPS)
        assert len(found) == n
        numbers = [number for number in ids(found) if number]
        assert len(numbers) == len(set(numbers)), "each id once"
    assert ids(tracker.update(boxes(), 6 / FPS)) == []


def test_a_detections_tracks_are_checked_and_chosen_with_it() -> None:
    found = boxes((0, 0, 0.9, 0), (50, 0, 0.2, 1)).with_tracks(np.array([7, 0]))
    assert ids(found.above(0.5)) == [7]
    assert found.to_dicts(("cat", "dog"))[0]["track"] == 7
    assert "track" not in found.to_dicts(("cat", "dog"))[1]
    with pytest.raises(ValueError, match="expected track"):
        found.with_tracks(np.array([1]))


def written(tmp_path: Path, *words: str) -> list[Any]:
    tiny, video = kit.build_tiny(tmp_path / "tiny.onnx"), kit.write_video(tmp_path / "a.mp4")
    out = tmp_path / "out.jsonl"
    line = ["run", "--model", str(tiny), "--source", str(video), "--display", "none"]
    line += ["--reference", "none", "--score", "0.1", "--jsonl", str(out), *words]
    assert main(line) == 0
    return [box for row in out.read_text().splitlines() for box in json.loads(row)["detections"]]


def test_a_run_writes_ids_unless_told_not_to(tmp_path: Path) -> None:
    found = written(tmp_path)
    assert found
    assert any(box.get("track") for box in found)
    assert len({box["track"] for box in found if "track" in box}) < len(found) / 2
    assert not any("track" in box for box in written(tmp_path, "--no-track"))
