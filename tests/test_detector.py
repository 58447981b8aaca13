"""The detector on small files made here, and what it says of bad ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from edgesight.models.detections import Detections
from edgesight.models.detector import OnnxDetector
from edgesight.models.errors import ModelFileError
from edgesight.models.heads import cells
from edgesight.models.spec import METADATA_KEY, ModelSpec
from onnx import helper, numpy_helper

PICTURE = np.zeros((32, 64, 3), np.uint8)  # twice as wide as the 32x32 input: half the scale
PERSON, MOTORCYCLE = [8, 16, 40, 32], [32, 32, 64, 32]  # the latter lies in the padding


def check_boxes(found: Detections) -> None:
    assert found.label.tolist() == [0, 2]
    np.testing.assert_allclose(found.score, [0.72, 0.5], rtol=1e-6)
    np.testing.assert_allclose(found.xyxy, [PERSON, MOTORCYCLE], atol=1e-4)


def test_boxes_come_back_in_source_pixels(tiny_onnx: Any, tiny_spec: ModelSpec) -> None:
    check_boxes(OnnxDetector(tiny_onnx(spec=tiny_spec))(PICTURE))


def test_bytes_in_the_network_give_the_same(tiny_onnx: Any, tiny_spec: ModelSpec) -> None:
    spec = tiny_spec.with_changes(input_format="uint8_nhwc")
    detector = OnnxDetector(tiny_onnx(spec=spec, uint8=True))
    assert detector.spec == spec
    check_boxes(detector(PICTURE))


def test_a_file_without_spec_is_recognised_and_stages_add_up(tiny_onnx: Any) -> None:
    detector = OnnxDetector(tiny_onnx(), threads=2)
    assert detector.spec.head == "yolox"
    tensor, placement = detector.preprocess(PICTURE)
    assert tensor.shape == (1, 3, 32, 32)
    check_boxes(detector.postprocess(detector.infer(tensor), placement))


def test_a_yolox_with_its_decoding_inside_is_refused(tiny_onnx: Any) -> None:
    grid = cells((32, 32), (8, 16, 32))
    rows = np.random.default_rng(0).uniform(0, 1, (1, len(grid), 8)).astype(np.float32)
    raw = tiny_onnx({"output": rows}, name="raw.onnx")
    assert OnnxDetector(raw).spec.head == "yolox"
    rows[0, :, :2] = (rows[0, :, :2] + grid[:, :2]) * grid[:, 2:]
    rows[0, :, 2:4] = np.exp(rows[0, :, 2:4]) * grid[:, 2:]
    fails(tiny_onnx({"output": rows}), "found boxes in pixels; export the model without its dec")


def test_floor_and_limit(tiny_onnx: Any) -> None:
    detector = OnnxDetector(tiny_onnx())
    assert detector(PICTURE, 0.6).label.tolist() == [0]
    assert detector(PICTURE, limit=1).label.tolist() == [0]
    assert len(detector(PICTURE, 0.9)) == 0


def test_the_optimised_graph_can_be_looked_at(tiny_onnx: Any, tmp_path: Path) -> None:
    OnnxDetector(tiny_onnx(), optimized_path=tmp_path / "optimised.onnx")
    assert onnx.load(tmp_path / "optimised.onnx").graph.node


def fails(path: Path, complaint: str, **options: Any) -> None:
    with pytest.raises(ModelFileError, match=complaint) as caught:
        OnnxDetector(path, **options)
    assert str(path) in str(caught.value) or "--head" in complaint
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(path))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_file(tiny_onnx: Any, share: float) -> None:
    path = tiny_onnx()
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    fails(path, "expected an ONNX model, found .* bytes .*copy or export it again|known head")


def test_what_is_not_onnx(tmp_path: Path) -> None:
    fails(tmp_path / "none.onnx", "found no such file")
    fails(tmp_path, "found no such file")
    (tmp_path / "text.onnx").write_text("<html>not found</html>")
    fails(tmp_path / "text.onnx", "expected an ONNX model, found 22 bytes")


def test_a_head_that_does_not_fit(tiny_onnx: Any, tiny_spec: ModelSpec) -> None:
    path = tiny_onnx({"feature": np.zeros((1, 85, 4, 4), np.float32)})
    fails(path, r"expected the raw outputs of a known head.*feature \[1, 85, 4, 4\].*--head")
    fails(tiny_onnx(), "expected the outputs of a ssdlite head", head="ssdlite")
    fails(tiny_onnx(), "--head: expected one of", head="fastestdet")
    fails(tiny_onnx(spec=tiny_spec.with_changes(classes=("a",))), "with 1 classes.*export it again")
    fails(tiny_onnx(spec=tiny_spec.with_changes(head="foo")), "expected a head of .*'foo'")
    fails(tiny_onnx(metadata={METADATA_KEY: "{"}), "model spec: expected JSON")


def test_an_input_of_the_wrong_kind(tiny_onnx: Any, tiny_spec: ModelSpec) -> None:
    fails(tiny_onnx(spec=tiny_spec, uint8=True), r"expected input \[1, 3, 32, 32\] tensor.float.")
    bytes_in = tiny_spec.with_changes(input_format="uint8_nhwc")
    fails(tiny_onnx(spec=bytes_in), r"expected input \[1, 32, 32, 3\] tensor.uint8.")
    other = tiny_spec.with_changes(input_hw=(16, 84))  # as many cells, another picture
    fails(tiny_onnx(spec=other), "expected")


def test_a_model_that_loads_but_does_not_run(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["images"], ["mean"], keepdims=0),
            helper.make_node("Cast", ["mean"], ["zero"], to=7),
            helper.make_node("Add", ["zero", "nine"], ["index"]),
            helper.make_node("Gather", ["table", "index"], ["output"]),
        ],
        "broken",
        [helper.make_tensor_value_info("images", 1, [1, 3, 32, 32])],
        [helper.make_tensor_value_info("output", 1, [1, 21, 8])],
        [
            numpy_helper.from_array(np.array(9, np.int64), "nine"),
            numpy_helper.from_array(np.zeros((2, 1, 21, 8), np.float32), "table"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    onnx.save(model, tmp_path / "broken.onnx")
    fails(tmp_path / "broken.onnx", "expected a model that runs")
