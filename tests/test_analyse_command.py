"""``edgesight analyse``: words and page, sensitivity of planted layers, going on, bad input."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
from edgesight.__main__ import main
from edgesight.compression import layer_sensitivity
from edgesight.compression.analyse import count_costs
from edgesight.compression.calibrate import read_photos
from edgesight.compression.layer_sensitivity import Disagreement, Variants
from edgesight.compression.onnx_io import save_model
from edgesight.compression.redundancy import of_activations
from edgesight.compression.traced import Traced
from edgesight.models.dataset import load_image
from edgesight.models.detector import OnnxDetector
from onnx import helper, numpy_helper

kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny_graphs.py"))))
TREATMENTS = ("prune", "factorise", "quantize")


def detector(wild: float = 1.0) -> Any:
    """A YOLOX-shaped detector of which one layer does everything and one nothing.

    ``vital`` alone leads to the boxes; what ``idle`` makes is multiplied by zero. ``wild``: the
    factor by which one of vital's channels is larger, which the layer behind takes back.
    """
    b = kit.GraphBuilder(1)
    x = b.relu(b.conv("images", (3, 8), 7, 8))
    vital = b.conv(x, (8, 8), 3)
    b.nodes[-1].name = "/net/net.0/vital/Conv"
    idle = b.conv(x, (8, 8), 3)
    b.nodes[-1].name = "/net/net.0/idle/Conv"
    nothing = b.add("Mul", [idle, b.store("zero", np.zeros((), np.float32))])
    both = b.relu(b.add("Add", [vital, nothing]))
    x = b.add("Concat", [(b.conv(both, (8, n))) for n in (4, 1, 2)], axis=1)
    heads = [n for n in b.nodes if n.op_type == "Conv"][-3:]
    names = ["box", "thing", "kind"]
    for node, name in zip(heads, names, strict=True):
        node.name = name
    scores = [b.add("Sigmoid", [n.output[0]]) for n in heads[1:]]
    x = b.add("Concat", [heads[0].output[0], *scores], axis=1)
    x = b.add("Reshape", [x, b.store("flat", np.array([1, 7, 64], np.int64))])
    model = b.model(b.add("Transpose", [x], perm=[0, 2, 1]), [1, 64, 7])
    stored = {t.name: t for t in model.graph.initializer}

    def scale(name: str, factor: Any) -> None:
        value = numpy_helper.to_array(stored[name]) * factor
        stored[name].CopyFrom(numpy_helper.from_array(value.astype(np.float32), name))

    up = np.where(np.arange(8) == 3, wild, 1.0)
    weights, bias = b.nodes[2].input[1:]
    scale(weights, up.reshape(-1, 1, 1, 1))
    scale(bias, up)
    for node in heads:
        scale(node.input[1], 1 / up.reshape(1, -1, 1, 1))
    scale(heads[0].input[1], 0.1)  # boxes stay in and near their cells
    return model


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    save_model(detector(), path, kit.SPEC)
    return path


@pytest.fixture
def folder(photos: list[Path]) -> Path:
    """Four photos of blobs."""
    folder = photos[0].parent / "photos"
    folder.mkdir()
    for path in photos[:4]:
        path.rename(folder / path.name)
    return folder


def analyse(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    assert main(["analyse", *map(str, args), "--json", "--quiet"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def losses(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {row["short"]: row["sensitivity"] for row in report["layers"]}


def test_the_planted_layers_are_told_apart(
    model_file: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    report = analyse(capsys, model_file, "--photos", folder, "--sensitivity", "--out", out)
    found = losses(report)
    assert found["net.0/idle"] == dict.fromkeys(TREATMENTS, 0)
    assert found["net.0/vital"]["prune"] > 1
    assert found["net.0/vital"]["factorise"] > 1
    assert found["net.0/vital"]["quantize"] > 0
    assert "prune" not in found["box"]  # its channels are the boxes
    assert report["unit"] == "% of disagreement"
    words = next(s for s in report["findings"] if s.startswith("to factorise"))
    assert "net.0/idle (0.0)" in words.partition("least loss")[2]
    assert "net.0/idle" not in words.partition("in %")[0]


def test_one_wild_channel_makes_a_layer_fragile_to_8_bits(folder: Path) -> None:
    found = []
    for wild in (1.0, 300.0):
        traced = Traced(detector(wild))
        layers = count_costs(traced, 0).layers
        vital = next(la for la in layers if "vital" in la.name)
        paths = sorted(folder.iterdir())
        seen = of_activations(
            traced, layers, read_photos(paths, kit.SPEC), progress=lambda x, **_: x
        )
        variant = Variants(traced, seen).make(vital, "quantize")
        found.append(Disagreement(traced.model, paths, kit.SPEC).loss(variant))
    assert found[1] > 5 * found[0]


def changed_layer(treatment: str) -> tuple[Any, Any, Any, Any, Any]:
    """Returns model, variant, the layer, and its output in both on one picture."""
    traced = Traced(detector())
    layers = count_costs(traced, 0).layers
    vital = next(la for la in layers if "vital" in la.name)
    picture = np.random.default_rng(0).normal(size=(1, 3, kit.SIZE, kit.SIZE)).astype(np.float32)
    seen = of_activations(traced, layers, [picture], progress=lambda x, **_: x)
    variants = Variants(traced, seen)
    assert treatment in variants.treatments(vital)
    before = traced.model.SerializeToString()
    variant = variants.make(vital, treatment)
    assert traced.model.SerializeToString() == before  # the original is left alone
    onnx.checker.check_model(variant)
    outputs = []
    for model in (traced.model, variant):
        extended = onnx.ModelProto()
        extended.CopyFrom(model)
        extended.graph.output.append(helper.make_empty_tensor_value_info(vital.behind))
        outputs.append(kit.run(extended, picture, [vital.behind])[0])
    return traced, variant, vital, outputs[0], outputs[1]


def test_pruning_silences_the_smallest_channels() -> None:
    traced, _, layer, before, after = changed_layer("prune")
    weight = traced.constants[
        next(n for n in traced.model.graph.node if n.output[0] == layer.output).input[1]
    ]
    norm = np.linalg.norm(weight.reshape(8, -1), axis=1)
    silent = [not after[0, c].any() for c in range(8)]
    assert sorted(np.flatnonzero(silent)) == sorted(np.argsort(norm)[:2])
    assert np.array_equal(after[:, np.invert(silent)], before[:, np.invert(silent)])


def test_factorising_leaves_half_of_the_rank() -> None:
    _, variant, layer, _, _ = changed_layer("factorise")
    node = next(n for n in variant.graph.node if n.output[0] == layer.output)
    weight = kit.weights(variant)[node.input[1]].reshape(8, -1)
    values = np.linalg.svd(weight, compute_uv=False)
    assert int((values > 1e-5 * values[0]).sum()) == 4


def test_quantizing_puts_the_output_on_256_values() -> None:
    _, _, _, before, after = changed_layer("quantize")
    steps = np.diff(np.unique(after))
    assert len(np.unique(before)) > 256 >= len(np.unique(after)) > 50
    assert np.allclose(steps / steps.min(), np.rint(steps / steps.min()), atol=1e-3)
    assert np.abs(after - before).max() < 3 * steps.min()


def test_the_page_the_table_and_the_words(
    model_file: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "out"
    args = ["analyse", str(model_file), "--photos", str(folder), "--quiet", "--out", str(out)]
    assert main([*args, "--sensitivity", "--top", "2"]) == 0
    text = capsys.readouterr().out
    words = " ".join(text.split())
    # 7x7 from 3 to 8 channels on 64 cells is 75,264; the two 3x3 are 36,864 each, the head 3,584.
    assert "- 2 of 6 layers hold 73 % of the 0.2 M multiply-accumulates: n0 (49 %), net.0" in words
    assert "not counted as multiply-accumulates: 2 Concat, 2 Relu, 2 Sigmoid, 1 Add" in words
    assert re.search(r"^net\.0/vital +3x3 +8x8x8 +584 +0\.04", text, re.MULTILINE)
    assert re.search(r"^and 4 layers more with", text, re.MULTILINE)
    assert "total: 6 layers, " in text
    report = json.loads((out / "analysis.json").read_text())
    assert report["totals"]["macs"] == sum(row["macs"] for row in report["layers"])
    page = (out / "analysis.html").read_text()
    assert page.count("<svg") == 5
    assert "http" not in page.replace("http://www.w3.org", "")
    for name in ("net.0/vital", "net.0/idle", "Sensitivity", "Redundancy", "Roy and Vetterli"):
        assert name in page


def test_names_from_a_file_cannot_write_the_page(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = detector()
    model.graph.node[2].name = "<script>alert(1)</script>"
    path = tmp_path / "model.onnx"
    save_model(model, path, kit.SPEC)
    analyse(capsys, path, "--photos", folder, "--out", tmp_path / "out")
    assert "<script" not in (tmp_path / "out" / "analysis.html").read_text()


def test_the_shipped_model_needs_no_more_words(capsys: pytest.CaptureFixture[str]) -> None:
    """INT8, with the sample photos."""
    report = analyse(capsys, "shipped")
    assert report["photos"]["count"] == 5
    assert report["totals"]["layers"] == 110
    row = max(report["layers"], key=lambda r: r["macs"])
    assert 0 < row["redundancy"]["effective_rank"] < row["redundancy"]["channels"]
    assert 4 < row["redundancy"]["weight_entropy_bits"] < 8
    assert row["quantized"]
    assert any("description of the graph" in s for s in report["findings"])


class Interrupted:
    """Counts measurements, and presses Ctrl-C at the wanted one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.stop_at = 0, 0
        real = Disagreement.loss

        def loss(judge: Disagreement, model: Any) -> float:
            self.count += 1
            if self.count == self.stop_at:
                raise KeyboardInterrupt
            return real(judge, model)

        monkeypatch.setattr(layer_sensitivity.Disagreement, "loss", loss)


def test_an_interrupted_scan_goes_on(
    model_file: Path,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = (model_file, "--photos", folder, "--sensitivity", "--out")
    whole = analyse(capsys, *args, tmp_path / "whole")
    changes = sum(map(len, losses(whole).values()))
    meter = Interrupted(monkeypatch)
    out = tmp_path / "out"
    meter.stop_at = 6
    assert main(["analyse", *map(str, args), str(out), "--quiet"]) == 130
    error = capsys.readouterr().err
    assert "interrupted; 5 measurements are in" in error
    assert not (out / "analysis.json").exists()
    meter.count, meter.stop_at = 0, 0
    assert losses(analyse(capsys, *args, out)) == losses(whole)
    assert meter.count == changes - 5
    meter.count = 0
    assert losses(analyse(capsys, *args, out)) == losses(whole)
    assert meter.count == 0
    # Other photos are another measurement; the first is kept.
    analyse(capsys, *args, out, "--limit", "2")
    assert meter.count == changes
    assert len(list(out.glob("sensitivity-*.json"))) == 2
    # What cannot be read is measured again.
    meter.count = 0
    for path in out.glob("sensitivity-*.json"):
        path.write_text('{"version": 1, "losses": [')
    assert losses(analyse(capsys, *args, out)) == losses(whole)
    assert meter.count == changes


@pytest.fixture
def labelled(model_file: Path, folder: Path, tmp_path: Path) -> Path:
    """The photos, labelled with what the model itself sees best."""
    see = OnnxDetector(model_file)
    images, annotations = [], []
    target = tmp_path / "labelled"
    (target / "images").mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir()), 1):
        image = load_image(path)
        cv2.imwrite(str(target / "images" / path.name), image)
        height, width = image.shape[:2]
        images.append({"id": number, "file_name": path.name, "width": width, "height": height})
        found = see(image, 0.05, 3)
        for box, label in zip(found.xyxy.astype(float), found.label, strict=True):
            x1, y1, x2, y2 = box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": int(label) + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                }
            )
    categories = [{"id": i, "name": name} for i, name in enumerate(kit.CLASSES, 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (target / "instances.json").write_text(json.dumps(content))
    return target


def test_with_labels_sensitivity_is_ap_lost(
    model_file: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    report = analyse(capsys, model_file, "--eval", labelled, "--sensitivity", "--out", out)
    found = losses(report)
    assert report["unit"] == "points of AP"
    assert found["net.0/idle"] == dict.fromkeys(TREATMENTS, 0)
    assert found["net.0/vital"]["prune"] > 5


def test_a_head_that_nobody_knows_is_counted_all_the_same(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = detector()
    path = tmp_path / "odd.onnx"
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("t2", 1, [1, 8, 8, 8]))
    onnx.save(model, path)
    assert main(["analyse", str(path)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "costs and weights only, no photos can be shown to it" in text
    assert "total: 6 layers" in text
    assert main(["analyse", str(path), "--photos", str(folder)]) == 2
    assert "name its head" in capsys.readouterr().err


def test_wrong_input_ends_with_one_line(
    model_file: Path,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "text.onnx").write_text("no model")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    out = ("--sensitivity", "--out", tmp_path / "out")
    for args, words in (
        ((tmp_path / "none.onnx",), "found no such file"),
        ((tmp_path / "text.onnx",), "expected an ONNX model"),
        ((model_file, "--photos", tmp_path / "empty"), "expected photos"),
        ((model_file, "--photos", folder, "--sensitivity"), "expected --out DIR"),
        ((model_file, *out), "add --photos DIR"),
        ((model_file, "--eval", folder), "add --sensitivity"),
        ((model_file, "--eval", folder, *out), "expected photos with boxes"),
        ((model_file, "--out", tmp_path / "file"), "expected a folder, found a file"),
    ):
        assert main(["analyse", *map(str, args), "--quiet"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert words in error
    assert not (tmp_path / "out").exists()


def test_photos_in_which_nothing_is_seen_measure_nothing(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = detector()
    for node in model.graph.node:
        if node.name == "thing":
            stored = next(t for t in model.graph.initializer if t.name == node.input[2])
            stored.CopyFrom(numpy_helper.from_array(np.full(1, -1e4, np.float32), stored.name))
    path = tmp_path / "blind.onnx"
    save_model(model, path, kit.SPEC)
    args = ["analyse", str(path), "--photos", str(folder), "--quiet", "--sensitivity", "--out"]
    assert main([*args, str(tmp_path / "out")]) == 2
    assert "expected photos in which the model sees something" in capsys.readouterr().err
