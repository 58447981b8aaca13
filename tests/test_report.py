"""The report: every figure in JSON, one page that needs nothing from outside."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from edgesight.compression.report import (
    JSON_FILE,
    example_pictures,
    headline,
    loss_text,
    render,
    score_text,
    write_report,
)
from edgesight.models.dataset import open_dataset
from edgesight.models.errors import OutputError
from edgesight.models.machine import machine

build_tiny: Any = runpy.run_path(str(Path(__file__).with_name("app_kit.py")))["build_tiny"]


def score(value: float | None, kind: str = "ap", loss: float | None = 0.0) -> dict[str, Any]:
    return {
        "kind": kind,
        "value": value,
        "low": None if value is None else value - 1,
        "high": None if value is None else value + 1,
        "photos": 40,
        "loss": loss,
        "loss_low": loss,
        "loss_high": loss,
        "more": {k: 12.5 for k in ("ap50", "ap75", "ap_small", "ap_medium", "ap_large")},
        "note": None,
    }


def step(title: str, part: float, **more: Any) -> dict[str, Any]:
    return {
        "title": title,
        "parameters": int(1e6 * part),
        "macs": int(5e8 * part),
        "bytes": int(4e6 * part),
        "score": score(26.3 * part),
        "seconds": 3.5,
        "resumed": False,
        "notes": [],
        "figures": {},
    } | more


@pytest.fixture
def report() -> dict[str, Any]:
    """A report as a whole recipe makes it."""
    return {
        "model": "<script>alert(1)</script>",
        "core": "cortex-a76",
        "input_hw": [320, 416],
        "passed": True,
        "photos": {"learned_from": 90, "measured_on": 40, "measured_on_from": "eval"},
        "steps": [
            step("original", 1),
            step("1 prune", 0.5, figures={"layers": {"stem.conv": [8, 16], "b": [24, 32]}}),
            step("2 quantize", 0.4, notes=["a note with <b> in it"]),
            step("3 verify", 0.4, score=None),
        ],
        "verify": {
            "photos": 40,
            "photos_from": "eval",
            "passed": True,
            "before": score(26.3),
            "after": score(25.1, loss=1.2),
            "agreement": score(91.5, "f1", None),
            "parity": {
                "torch and float file": {
                    "photos": 32, "boxes": 300, "lost": 0, "box_px": 0.01, "score": 0.001,
                    "same": True,
                }
            },
            "integer": {"quantized": True, "share": 0.937, "note": None},
            "latency": {"before_ms": 13.5, "after_ms": 9.25, "ratio": 0.69},
            "cores": [
                {"core": "cortex-a76", "target": True, "instructions": None, "reason": "no qemu"}
            ],
        },
        "files": {"final": {"name": "model.onnx", "bytes": 1600000, "sha256": "ab" * 32}},
        "recipe": {"version": 1, "steps": [{"kind": "prune"}]},
        "machine": machine(),
        "seconds": 12.0,
    }  # fmt: skip


def test_the_page_needs_nothing_from_outside(report: dict[str, Any]) -> None:
    page = render(report, [{"name": "a.jpg", "before": "data:image/jpeg;base64,AA", "after": "data:image/jpeg;base64,BB"}])  # fmt: skip  # noqa: E501
    assert not re.search(r"https?://", page)
    assert all(a.startswith(("data:", "#")) for a in re.findall(r'(?:src|href)="([^"]*)"', page))
    assert "@import" not in page
    assert "url(" not in re.sub(r"url\(#", "", page)
    assert "prefers-color-scheme: dark" in page
    assert page.count("<svg") == 3
    assert "currentColor" in page
    assert "#010203" not in page


def test_the_page_has_the_figures(report: dict[str, Any]) -> None:
    page = render(report, [])
    for text in (
        "26.3 [25.3, 27.3]", "25.1", "1.20 [1.20, 1.20]", "4.00 MB", "1.60 MB", "500.0 M",
        "13.50 -&gt; 9.25 ms", "93.7 %", "91.5", "n/a", "no qemu", "model.onnx", "eval",
        "stem.conv", report["machine"]["cpu"], report["machine"]["versions"]["torch"],
    ):  # fmt: skip
        assert text in page, text
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "with &lt;b&gt; in it" in page
    assert "A check failed" not in page
    report["passed"] = report["verify"]["parity"]["torch and float file"]["same"] = False
    assert "A check failed" in render(report, [])


def test_without_verify_and_without_scores(report: dict[str, Any]) -> None:
    report["verify"] = None
    for row in report["steps"]:
        row["score"] = None
    page = render(report, [])
    assert "n/a" in page
    assert [row[0] for row in headline(report)] == ["size", "multiply-accumulates"]


def test_scores_as_text() -> None:
    assert score_text(None) == score_text(score(None)) == "n/a"
    assert score_text(score(26.31)) == "26.3 [25.3, 27.3]"
    assert loss_text(score(26.3, "f1", None)) == loss_text(None) == ""
    assert loss_text(score(26.3, "ap", 0.456)) == "0.46 [0.46, 0.46]"


def test_the_json_is_strict_and_whole(report: dict[str, Any], tmp_path: Path) -> None:
    def refuse(name: str) -> Any:
        pytest.fail(f"{name} is not JSON")

    page = write_report(tmp_path, report, [])
    found = json.loads((tmp_path / JSON_FILE).read_text(), parse_constant=refuse)
    assert found == json.loads(json.dumps(report))
    assert page.read_text().startswith("<!doctype html>")


def test_a_folder_that_cannot_be_written(report: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OutputError, match="cannot write"):
        write_report(tmp_path / "out", report, [])


def test_pictures_of_before_and_after(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(5):
        cv2.imwrite(str(folder / f"{i}.png"), np.full((600, 900, 3), 200, np.uint8))
    before = build_tiny(tmp_path / "a.onnx", always=True)
    after = build_tiny(tmp_path / "b.onnx", always=True, shift=6)
    found = example_pictures(before, after, open_dataset(folder))
    assert len(found) == 3
    for picture in found:
        assert picture["before"].startswith("data:image/jpeg;base64,")
        assert picture["before"] != picture["after"], "the boxes lie elsewhere"
