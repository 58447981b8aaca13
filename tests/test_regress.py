"""The ``regress`` command on real detectors: what passes, what fails, and what is refused."""

from __future__ import annotations

import base64
import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
from edgesight import __main__ as commands
from edgesight.models.detector import OnnxDetector
from edgesight.models.zoo import shipped, shipped_float
from onnx import NodeProto, helper, numpy_helper

kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("gate_kit.py"))))
app: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("app_kit.py"))))
PHOTOS = 35
QUICK = ("--skip", "latency,cost", "--resamples", 100)


@pytest.fixture(autouse=True)
def _command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(commands.COMMANDS, "regress", (".deploy.regress", "the gate"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The samples and parts of them; the float model's boxes are the true ones."""
    folder = tmp_path_factory.mktemp("gate")
    photos = kit.more_photos(folder / "photos", PHOTOS)
    return Path(kit.label(folder / "data", photos, shipped_float()))


@pytest.fixture(scope="module")
def stored(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A baseline of the shipped detector."""
    path = tmp_path_factory.mktemp("stored") / "good.json"
    commands.COMMANDS.setdefault("regress", (".deploy.regress", "the gate"))
    words = ["regress", "shipped", "--baseline", "shipped", "--data", str(data)]
    assert commands.main([*words, *map(str, QUICK), "--store-baseline", str(path)]) == 0
    return path


def run(
    capsys: pytest.CaptureFixture[str], new: object, old: object, data: Path, *more: object
) -> tuple[int, str, str]:
    words = [new, "--baseline", old, "--data", data, *(more or QUICK)]
    capsys.readouterr()
    code = commands.main(["regress", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def outcomes(path: Path) -> dict[str, str]:
    return {c["name"]: c["outcome"] for c in json.loads(path.read_text())["checks"]}


def test_a_model_passes_against_itself_with_every_report(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / name for name in ("a.json", "a.xml", "a.html")]
    places = [w for pair in zip(("--json", "--junit", "--html"), files, strict=True) for w in pair]
    more = ("--skip", "latency,start time", "--resamples", 200, "--seed", 3, *places)
    code, out, err = run(capsys, "shipped", "shipped", data, *more)
    assert (code, "Traceback" in err) == (0, False), out
    assert out.splitlines()[-1] == "regression gate: pass"
    assert f"{PHOTOS}/{PHOTOS}" in err  # the bar
    report = json.loads(files[0].read_text())
    assert report["passed"]
    assert report["new"]["sha256"] == report["old"]["sha256"]
    assert report["photos"] == PHOTOS
    assert report["machine"]["cpu"]
    assert report["options"]["seed"] == 3
    assert report["skipped"] == ["latency", "start time"]
    found = outcomes(files[0])
    assert {"AP", "agreement", "memory", "file size", "class map"} <= found.keys()
    suite = ElementTree.parse(files[1]).getroot().find("testsuite")
    assert suite is not None
    assert suite.attrib["failures"] == "0"
    assert int(suite.attrib["tests"]) == len(found)
    assert "http:" not in files[2].read_text()


def zeroed(model: Any) -> None:
    stored = {t.name: t for t in model.graph.initializer}
    name = [n for n in model.graph.node if n.op_type == "Conv"][40].input[1]
    nothing = np.zeros_like(numpy_helper.to_array(stored[name]))
    stored[name].CopyFrom(numpy_helper.from_array(nothing, name))


def swapped(model: Any) -> None:
    """Red for blue inside the network: nothing in the file's spec tells."""
    picture = model.graph.input[0].name
    order = numpy_helper.from_array(np.array([2, 1, 0], np.int64), "turned_order")
    model.graph.initializer.append(order)
    nodes = [NodeProto.FromString(n.SerializeToString()) for n in model.graph.node]
    for one in nodes:
        for place, name in enumerate(one.input):
            one.input[place] = "turned" if name == picture else name
    axis = 3 if model.graph.input[0].type.tensor_type.elem_type == 2 else 1
    turn = helper.make_node("Gather", [picture, "turned_order"], ["turned"], axis=axis)
    del model.graph.node[:]
    model.graph.node.extend([turn, *nodes])


@pytest.mark.parametrize(
    ("fault", "caught_by"),
    [
        ("colours", "colour order"),
        ("stretched", "pre-processing"),
        ("classes", "class map"),
        ("no nms", "doubled boxes"),
        ("tail", "head tail"),
        ("per tensor", "weight scales"),
        ("float", "runs as integers"),
        ("layer", "AP"),
        ("calibration", "calibration"),
    ],
)
def test_a_seeded_fault_fails_by_its_own_check(
    fault: str, caught_by: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = shipped(), tmp_path / "bad.onnx"
    classes = OnnxDetector(good).spec.classes
    if fault == "layer":
        good = shipped_float()
    if fault == "colours":
        kit.edited(good, bad, swapped)
    elif fault == "stretched":
        kit.respec(good, bad, resize="letterbox_topleft")
    elif fault == "classes":
        kit.respec(good, bad, classes=("background", *classes[:-1]))
    elif fault == "no nms":
        kit.respec(good, bad, nms_iou=1.0)
    elif fault == "tail":
        kit.quantized_tail(good, bad)
    elif fault == "per tensor":
        kit.per_tensor(good, bad)
    elif fault == "float":
        bad.write_bytes(shipped_float().read_bytes())
    elif fault == "layer":
        kit.edited(good, bad, zeroed)
    else:
        kit.respec(good, bad, more={"edgesight.calibration": '{"photos": 3}'})
    report = tmp_path / "report.json"
    skip = "latency,cost" if caught_by == "AP" else "latency,cost,accuracy"
    more = ("--skip", skip, "--resamples", 100, "--json", report)
    code, out, _ = run(capsys, bad, good, data, *more)
    assert outcomes(report)[caught_by] == "fail", out
    assert code == 1
    assert out.splitlines()[-1] == "regression gate: fail"


def test_a_slower_model_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fast = app.build_tiny(tmp_path / "fast.onnx", always=True)
    slow = app.build_tiny(tmp_path / "slow.onnx", always=True, work=8)
    data = kit.label(tmp_path / "data", kit.more_photos(tmp_path / "photos", PHOTOS), fast)
    more = ("--skip", "cost", "--resamples", 100, "--json", tmp_path / "r.json")
    code, out, _ = run(capsys, slow, fast, data, *more)
    found = outcomes(tmp_path / "r.json")
    assert (found.pop("latency p50"), found.pop("latency p90")) == ("fail", "fail"), out
    assert {k for k, v in found.items() if v != "pass"} <= {"AP of rare classes"}
    assert code == 1


def test_a_stored_baseline_stands_for_the_old_model(
    stored: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = [tmp_path / "file.json", tmp_path / "stored.json"]
    for old, report in zip(("shipped", stored), reports, strict=True):
        run(capsys, "shipped-float", old, data, *QUICK, "--json", report)
    both = [json.loads(report.read_text())["checks"] for report in reports]
    assert both[0] == both[1]  # to the last digit
    code, out, _ = run(capsys, "shipped", stored, data, "--skip", "accuracy", "--resamples", 100)
    assert code == 1
    assert "not enough evidence" in out.splitlines()[-1]
    assert "put the file beside the baseline" in out
    (stored.parent / shipped().name).write_bytes(shipped().read_bytes())
    more = ("--skip", "accuracy,latency,start time", "--json", tmp_path / "beside.json")
    code, _, _ = run(capsys, "shipped", stored, data, *more)
    assert code == 0
    assert outcomes(tmp_path / "beside.json")["memory"] == "pass"
    (stored.parent / shipped().name).unlink()


def test_a_baseline_is_stored_only_after_a_pass(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "b.json"
    path.write_text("the last good one")
    code, _, err = run(capsys, "shipped-float", "shipped", data, *QUICK, "--store-baseline", path)
    assert code == 1
    assert "not stored, it did not pass" in err
    assert path.read_text() == "the last good one"


def refused(result: tuple[int, str, str], words: str) -> None:
    code, out, err = result
    assert (code, out) == (2, "")
    assert words in err.splitlines()[-1]
    assert "Traceback" not in err


def packed(*row: float) -> str:
    return base64.b64encode(np.array(row, "<f4").tobytes()).decode()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(kind="other"), "another kind of JSON"),
        (lambda c: c.update(version=99), "version 99"),
        (lambda c: c.update(pickle="gASV"), "missing or unknown keys ['pickle']"),
        (lambda c: c.pop("machine"), "missing or unknown keys ['machine']"),
        (lambda c: c["model"].update(bytes="x"), "expected the facts of a model file"),
        (lambda c: c["model"]["spec"].update(classes=[]), "expected the facts of a model file"),
        (lambda c: c.update(data=[]), "no hash of its data"),
        (lambda c: c["detections"].pop(), "another number of photos"),
        (lambda c: c.update(score_min=float("nan")), "a score floor that is none"),
        (lambda c: c["detections"].__setitem__(3, 7), "damaged boxes of photo 3"),
        (lambda c: c["detections"].__setitem__(3, "%%%"), "damaged boxes of photo 3"),
        (lambda c: c["detections"].__setitem__(3, "AAAA"), "damaged boxes of photo 3 (3 bytes)"),
        (lambda c: c["detections"].__setitem__(3, "AAAA" * 4000), "photo 3 (12000 bytes)"),
        (
            lambda c: c["detections"].__setitem__(3, packed(0, np.nan, 0, 0, 1, 1)),
            "not finite",
        ),
        (lambda c: c["detections"].__setitem__(3, packed(80, 0.5, 0, 0, 1, 1)), "labels outside"),
        (lambda c: c["detections"].__setitem__(3, packed(0.5, 0.5, 0, 0, 1, 1)), "labels outside"),
        (lambda c: c["detections"].__setitem__(3, packed(0, 1.5, 0, 0, 1, 1)), "scores or corners"),
        (lambda c: c["detections"].__setitem__(3, packed(0, 0.5, 2, 0, 1, 1)), "scores or corners"),
        (lambda c: c["data"].update(sha256="0" * 64), "found one of other photos or boxes"),
    ],
)
def test_a_hostile_baseline_is_refused(
    change: Any,
    words: str,
    stored: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    content = json.loads(stored.read_text())
    change(content)
    (tmp_path / "bad.json").write_text(json.dumps(content))
    refused(run(capsys, "shipped", tmp_path / "bad.json", data), words)


@pytest.mark.parametrize(
    ("text", "words"),
    [(b"", "no JSON"), (b"\x80\x04pickle", "no JSON"), (b"[" * 100_000, "no JSON")],
)
def test_what_is_no_baseline_is_refused(
    text: bytes, words: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.json").write_bytes(text)
    refused(run(capsys, "shipped", tmp_path / "bad.json", data), words)
    refused(run(capsys, "shipped", tmp_path / "none.json", data), "no such file")
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(100 << 20)
    refused(run(capsys, "shipped", tmp_path / "large.json", data), "105 MB, where 67 MB")


def test_other_data_and_another_family_are_refused(
    stored: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_onnx: Any
) -> None:
    fewer = run(capsys, "shipped", stored, data, *QUICK, "--limit", 5)
    refused(fewer, f"{PHOTOS} photos where --data has 5")
    other = kit.int8_file(tmp_path / "other.onnx")
    for old in ("shipped", stored):
        refused(run(capsys, other, old, data), "expected a model of the same classes")
    plain = tmp_path / "plain"
    kit.more_photos(plain, 3)
    refused(run(capsys, "shipped", "shipped", plain), "expected photos with boxes")


@pytest.mark.parametrize("part", [0.0, 0.5, 0.95])
def test_a_truncated_model_is_refused_and_nothing_is_written(
    part: float, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = shipped().read_bytes()
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(content[: int(part * len(content))])
    more = (*QUICK, "--json", tmp_path / "r.json", "--store-baseline", tmp_path / "b.json")
    refused(run(capsys, bad, "shipped", data, *more), "bad.onnx: expected a")
    refused(run(capsys, "shipped", bad, data, *more), "bad.onnx: expected a")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.onnx"]


def test_wrong_words_are_refused_before_the_work(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(run(capsys, "shipped", "shipped", data, "--skip", "latencey"), "found 'latencey'")
    everything = "accuracy,latency,cost,structure,parity"
    refused(run(capsys, "shipped", "shipped", data, "--skip", everything), "found none; skip less")
    refused(run(capsys, "shipped", "shipped", data, "--json", tmp_path), "found a folder")


def test_more_photos_have_boxes(data: Path) -> None:
    content = json.loads((data / "instances.json").read_text())
    assert len(content["annotations"]) >= PHOTOS
    photo = cv2.imread(str(data / "images" / content["images"][-1]["file_name"]))
    assert photo is not None
