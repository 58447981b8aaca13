"""The gate's reports, its look at boxes, and the worst photos."""

from __future__ import annotations

import base64
import json
import re
import runpy
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
from edgesight.deploy.gate_frames import color_check, frame_checks
from edgesight.deploy.gate_pictures import WorstPhoto, worst_photos
from edgesight.deploy.gate_report import interval_bar, to_html, to_json, to_junit, to_text
from edgesight.deploy.verdict import Check, Verdict
from edgesight.models.dataset import GroundTruth, open_dataset
from edgesight.models.detections import Detections

kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("gate_kit.py"))))
NASTY = '<script>alert(1)</script> & "quoted" ]]> \x00\x1b[31m'
BARRED = {"difference": -0.4, "low": -1.7, "high": 0.6, "margin_ap": 1.0}
VERDICT = Verdict(
    (
        Check("class map", "parity", "pass", "the same 80 classes", {"new": 80}),
        Check("AP", "accuracy", "not enough evidence", "too few photos", BARRED),
        Check(f"AP of {NASTY}", "accuracy", "fail", NASTY, {"value": float("nan")}),
        Check("input size", "parity", "fail", "another", required=False),
    )
)
FACTS = {"new": {"name": f"new{NASTY}.onnx"}, "old": {"name": "old.onnx"}, "photos": 3}


class Page(HTMLParser):
    """Collects the tags of a page and whatever it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "img", "br", "line", "rect", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_json_has_everything_and_is_json() -> None:
    text = json.dumps(to_json(VERDICT, {**FACTS, "odd": np.float32(1.5)}), allow_nan=False)
    found = json.loads(text)
    assert (found["outcome"], found["passed"], found["odd"]) == ("fail", False, 1.5)
    assert [c["outcome"] for c in found["checks"]] == [c.outcome for c in VERDICT.checks]
    assert found["checks"][2]["figures"] == {"value": None}
    assert found["checks"][3]["required"] is False


def test_junit_has_a_case_per_check_and_fails_without_evidence() -> None:
    root = ElementTree.fromstring(to_junit(VERDICT, FACTS, 12.5))
    suite = root.find("testsuite")
    assert suite is not None
    assert suite.attrib["tests"] == root.attrib["tests"] == "4"
    assert suite.attrib["failures"] == root.attrib["failures"] == "2"
    assert suite.attrib["time"] == "12.500"
    cases = suite.findall("testcase")
    assert len(cases) == 4
    kinds = [None if (f := case.find("failure")) is None else f.attrib["type"] for case in cases]
    assert kinds == [None, "not enough evidence", "fail", None]
    assert cases[0].attrib["classname"] == "edgesight.regress.parity"
    assert cases[2].attrib["name"].startswith("AP of <script>")
    properties = {p.attrib["name"]: p.attrib["value"] for p in suite.iter("property")}
    assert properties == {"photos": "3"}


def test_the_page_is_whole_escaped_and_asks_the_network_nothing() -> None:
    _, jpeg = cv2.imencode(".jpg", np.zeros((8, 8, 3), np.uint8))
    text = to_html(VERDICT, FACTS, [WorstPhoto(f"a{NASTY}.jpg", 2, 1, jpeg.tobytes())])
    page = Page(text)
    assert page.open == []
    assert "script" not in page.tags
    assert page.tags.count("tr") == 1 + len(VERDICT.checks)
    assert len(page.addresses) == 1
    kind, _, data = page.addresses[0].partition(";base64,")
    assert kind == "data:image/jpeg"
    assert base64.b64decode(data) == jpeg.tobytes()
    assert not re.search(r"https?://|url\(|@import", text)
    assert "default-src 'none'" in text
    assert "prefers-color-scheme:dark" in text
    assert page.tags.count("svg") == 1
    assert not re.search("[\x00\x1b]", text)
    assert "4 checks, 1 failed, 1 without enough evidence" in text


def test_a_bar_shows_interval_and_margin_in_order() -> None:
    bar = ElementTree.fromstring(interval_bar(BARRED))
    margin, zero = (float(line.attrib["x1"]) for line in bar.iter("line"))
    rect, dot = next(bar.iter("rect")), next(bar.iter("circle"))
    left, wide = float(rect.attrib["x"]), float(rect.attrib["width"])
    assert 0 < left < margin < float(dot.attrib["cx"]) < zero < left + wide < 220
    slow = interval_bar({"ratio": 1.2, "low": 1.1, "high": 1.3, "slowdown_max": 0.05})
    limit, same = (float(line.attrib["x1"]) for line in ElementTree.fromstring(slow).iter("line"))
    assert same < limit < float(next(ElementTree.fromstring(slow).iter("rect")).attrib["x"])
    assert interval_bar({"value": 1.0}) == ""
    assert interval_bar({"value": 1.0, "low": float("nan"), "high": 2.0}) == ""
    assert interval_bar({"value": 0.0, "low": 0.0, "high": 0.0}) != ""  # of no width


def test_what_did_not_pass_is_told_last() -> None:
    lines = to_text(VERDICT).splitlines()
    assert [line.split()[0] for line in lines if line][:4] == ["pass", "info", "unsure", "FAIL"]
    assert lines[-1] == "regression gate: fail"


BOX = (10.0, 10.0, 60.0, 60.0)


def photos_of(*rows: list[tuple[Any, ...]], times: int = 12) -> list[Detections]:
    return [kit.boxes_of(list(row)) for _ in range(times) for row in rows]


def outcomes(new: list[Detections], old: list[Detections]) -> dict[str, str]:
    return {check.name: check.outcome for check in frame_checks(new, old, 0.6)}


OLD = photos_of([(*BOX, 0.9, 1), (100.0, 100.0, 150.0, 160.0, 0.8, 2)])


def test_the_same_boxes_pass() -> None:
    assert set(outcomes(OLD, OLD).values()) == {"pass"}


def test_no_boxes_at_all_fail() -> None:
    found = outcomes(photos_of([]), OLD)
    assert found["boxes at all"] == found["agreement"] == "fail"
    neither = outcomes(photos_of([]), photos_of([]))
    assert neither["boxes at all"] == neither["agreement"] == "not enough evidence"


def test_boxes_elsewhere_fail() -> None:
    moved = photos_of([(200.0, 10.0, 260.0, 60.0, 0.9, 1), (100.0, 10.0, 150.0, 60.0, 0.8, 2)])
    found = outcomes(moved, OLD)
    assert found["agreement"] == "fail"
    assert found["doubled boxes"] == "pass"


def test_doubled_boxes_are_those_of_one_class_alone() -> None:
    rows = [(10.0, 10.0, 60.0, 60.0 - i, 0.9, 1) for i in range(4)]
    assert outcomes(photos_of(rows), OLD)["doubled boxes"] == "fail"
    other = [(*BOX, 0.9, kind) for kind in range(4)]
    assert outcomes(photos_of(other), OLD)["doubled boxes"] == "pass"
    assert outcomes(photos_of(rows), photos_of(rows))["doubled boxes"] == "pass"


def test_labels_off_by_one_are_told() -> None:
    shifted = [Detections(one.xyxy, one.score, one.label + 1) for one in OLD]
    check = {c.name: c for c in frame_checks(shifted, OLD, 0.6)}["labels"]
    assert check.outcome == "fail"
    assert "100 % are off by +1" in check.reason
    few = {c.name: c for c in frame_checks(shifted[:2], OLD[:2], 0.6)}["labels"]
    assert not few.required


def test_swapped_colours_are_told_by_what_they_do() -> None:
    worse = OLD[:6] + photos_of([], times=6)
    assert color_check(worse, OLD, OLD).outcome == "fail"
    assert color_check(OLD, worse, OLD).outcome == "pass"
    assert color_check(OLD, OLD, OLD).outcome == "pass"
    assert not color_check(photos_of([]), photos_of([]), photos_of([])).required


@pytest.mark.parametrize("labelled", [True, False])
def test_the_worst_photos_come_first_and_only_those_that_got_worse(
    tiny_coco: Any, labelled: bool
) -> None:
    data = open_dataset(tiny_coco(tiny_coco.content(photos=4)))
    person, cycle = (8.0, 16.0, 40.0, 48.0, 0.9, 0), (32.0, 32.0, 64.0, 48.0, 0.9, 1)
    old = [kit.boxes_of([person, cycle])] * 4
    wrong = (0.0, 0.0, 8.0, 8.0, 0.9, 1)
    new = [
        old[0],
        kit.boxes_of([person]),
        kit.boxes_of([wrong, (0.0, 20.0, 6.0, 30.0, 0.9, 0)]),
        kit.boxes_of([person, cycle, (1.0, 1.0, 5.0, 5.0, 0.2, 0)]),  # too weak to be shown
    ]
    truths: list[GroundTruth] | None = list(data.labels()[1]) if labelled else None
    found = worst_photos(new, old, data, truths, ("person", "motorbike"))
    assert [(p.name, p.lost, p.gained) for p in found] == [("3.png", 2, 2), ("2.png", 1, 0)]
    picture = cv2.imdecode(np.frombuffer(found[0].jpeg, np.uint8), cv2.IMREAD_COLOR)
    assert picture is not None
    assert picture.shape == (48, 2 * 64 + 6, 3)
    assert len(worst_photos(new, old, data, truths, ("person", "motorbike"), 1)) == 1
