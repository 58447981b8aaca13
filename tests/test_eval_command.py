"""The ``eval`` command on a small detector and small photos."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgesight.__main__ import main
from edgesight.models.dataset import open_dataset
from edgesight.models.detector import OnnxDetector
from edgesight.models.evaluate import evaluate_detector
from edgesight.models.files import sha256
from edgesight.models.spec import ModelSpec


@pytest.fixture
def model(tiny_onnx: Any, tiny_spec: ModelSpec) -> Path:
    """Finds both kinds of box where ``tiny_coco`` has them, in pictures of 64x48."""
    path: Path = tiny_onnx(spec=tiny_spec)
    return path


@pytest.fixture
def blind(tiny_onnx: Any, tiny_spec: ModelSpec) -> Path:
    path: Path = tiny_onnx(
        {"output": np.zeros((1, 21, 8), np.float32)}, spec=tiny_spec, name="blind.onnx"
    )
    return path


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = main(["eval", *map(str, args)])
    out, err = capsys.readouterr()
    return code, out, err


def test_json_is_one_object_with_all_figures(
    model: Path, tiny_coco: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    content = tiny_coco.content(photos=5)
    content["categories"].reverse()  # another order than the model's
    folder = tiny_coco(content)
    code, out, err = run(capsys, model, "--data", folder, "--json", "--resamples", 50)
    assert code == 0
    report = json.loads(out)
    # In the 64x48 pictures the person is exact; the motorbike is cut at the picture's edge and
    # then exact too. Both are medium-sized, below 96x96 pixels.
    for key in ("ap", "ap50", "ap75"):
        assert report[key] == pytest.approx(100)
    assert report["ap_large"] is None
    assert report["interval"] == pytest.approx([100, 100])
    assert (report["n"], report["boxes"], report["classes"]) == (5, 10, 2)
    assert report["sha256"] == sha256(model)
    assert report["model"] == str(model)
    assert report["data"] == str(folder)
    assert report["bytes"] == model.stat().st_size
    assert report["ms_per_photo"] > 0
    assert report["machine"]["cpu"]
    assert {"edgesight", "onnxruntime", "numpy", "opencv"} <= report["machine"]["versions"].keys()
    assert "per_class" not in report
    assert "only the 2 shared classes count: 0 of the data's" in report["note"]
    assert "shared classes" in err
    assert "5/5" in err  # the bar
    assert "photos are few" in err


def test_table(model: Path, tiny_coco: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, model, "--data", tiny_coco(), "--per-class", "--resamples", 20)
    assert code == 0
    lines = out.splitlines()
    assert "2 photos, 4 boxes, 2 classes" in lines[0]
    assert any(line.split()[:3] == ["AP", "100.0", "[100.0,"] for line in lines)
    assert any(line.split() == ["AP", "LARGE", "-"] for line in lines)
    assert any(line.split() == ["motorcycle", "100.0"] for line in lines)


def test_limit_and_no_intervals(
    model: Path, tiny_coco: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_coco(tiny_coco.content(photos=6))
    args = ("--limit", 3, "--resamples", 0, "--json", "--per-class", "--threads", 2)
    code, out, _ = run(capsys, model, "--data", folder / "instances.json", *args)
    report = json.loads(out)
    assert (code, report["n"], report["interval"], report["threads"]) == (0, 3, None, 2)
    assert report["per_class"] == {"person": 100.0, "motorcycle": 100.0}


def test_baseline_gives_a_paired_difference(
    model: Path, blind: Path, tiny_coco: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ("--data", tiny_coco(), "--resamples", 30, "--baseline")
    _, out, _ = run(capsys, blind, *args, model, "--json")
    report = json.loads(out)
    assert report["ap"] == 0
    assert report["baseline"]["ap"] == pytest.approx(100)
    assert report["baseline"]["difference"] == pytest.approx(-100)
    assert report["baseline"]["interval"] == pytest.approx([-100, -100])
    assert report["baseline"]["sha256"] == sha256(model)
    _, out, _ = run(capsys, blind, *args, model)
    assert "difference -100.0  [-100.0, -100.0]  95 %, paired" in out


def test_a_baseline_of_other_classes_cannot_be_compared(
    model: Path,
    tiny_onnx: Any,
    tiny_spec: ModelSpec,
    tiny_coco: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = tiny_onnx(spec=tiny_spec.with_changes(classes=("person", "x", "y")), name="o.onnx")
    code, out, err = run(capsys, model, "--data", tiny_coco(), "--baseline", other)
    assert (code, out) == (2, "")
    assert "AP over different classes cannot be compared" in err


def test_only_shared_classes_count(
    tiny_onnx: Any, tiny_spec: ModelSpec, tiny_coco: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny_onnx(spec=tiny_spec.with_changes(classes=("person", "x", "y")))
    code, out, _ = run(capsys, path, "--data", tiny_coco(), "--json", "--resamples", 0)
    report = json.loads(out)
    assert (code, report["classes"], report["boxes"]) == (0, 1, 2)
    assert report["ap"] == pytest.approx(100)
    assert "1 of the data's classes are not in the model" in report["note"]


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda folder, model: model.write_bytes(b"junk"), "expected an ONNX model"),
        (lambda folder, model: model.unlink(), "found no such file"),
        (lambda folder, model: (folder / "instances.json").unlink(), "expected photos with boxes"),
        (lambda folder, model: (folder / "instances.json").write_text("{"), "expected JSON"),
        (lambda folder, model: (folder / "images" / "2.png").unlink(), "found no file '2.png'"),
        (
            lambda folder, model: (folder / "images" / "2.png").write_bytes(b""),
            "found an empty file",
        ),
        (
            lambda folder, model: (folder / "instances.json").write_text(
                (folder / "instances.json").read_text().replace("person", "nut").replace("bike", "")
            ),
            "expected categories that the model knows",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    model: Path, tiny_coco: Any, capsys: pytest.CaptureFixture[str], spoil: Any, complaint: str
) -> None:
    folder = tiny_coco()
    spoil(folder, model)
    code, out, err = run(capsys, model, "--data", folder, "--json")
    assert (code, out) == (2, "")
    last = err.strip().splitlines()[-1]
    assert last.startswith("edgesight: error: ")
    assert complaint in last
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "args", [["--limit", "0"], ["--limit", "x"], ["--resamples", "-1"], ["--threads", "1.5"], []]
)
def test_wrong_arguments(model: Path, args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["eval", str(model), *(["--data", "d"] if args else []), *args])
    assert stop.value.code == 2
    assert "expected a whole number" in (err := capsys.readouterr().err) or "--data" in err


def test_a_head_for_a_foreign_file(
    tiny_onnx: Any, tiny_coco: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = np.zeros((1, 21, 21), np.float32)
    path = tiny_onnx({"output": raw}, metadata={"names": str(["person"] + ["x"] * 15)})
    code, _, err = run(capsys, path, "--data", tiny_coco())
    assert code == 2
    assert "--head" in err
    code, _, _ = run(capsys, path, "--data", tiny_coco(name="again"), "--head", "yolox")
    assert code == 0


@pytest.mark.shared
@pytest.mark.timeout(900)  # half a minute each, minutes on a busy machine
@pytest.mark.parametrize(
    ("file", "ap", "ap50"),
    [("yolox_nano_416.onnx", 21.6, 36.4), ("nanodet_plus_m_416.onnx", 26.3, 40.2)],
)
def test_published_ap_on_coco_val(shared: Path, file: str, ap: float, ap50: float) -> None:
    """The image road is right to a tenth of a point: colours, cells, resize, NMS, metric."""
    data = open_dataset(shared / "data" / "coco-val")
    result = evaluate_detector(OnnxDetector(shared / "weights" / file, threads=2), data).result
    assert result.ap == pytest.approx(ap, abs=0.1)
    assert result.ap50 == pytest.approx(ap50, abs=0.1)
