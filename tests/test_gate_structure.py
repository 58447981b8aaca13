"""What the gate sees in two model files: classes, spec, integers, the head's tail, scales."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from edgesight.deploy.gate_graph import (
    convolutions,
    quantized_tail,
    quantizers,
    read_graph,
    weight_scales,
)
from edgesight.deploy.gate_structure import (
    FACTS_KEY,
    FileFacts,
    check_family,
    class_map_check,
    file_facts,
    structure_checks,
)
from edgesight.deploy.verdict import Check
from edgesight.models.errors import InputError, ModelFileError
from edgesight.models.zoo import shipped, shipped_float

kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("gate_kit.py"))))
OLD = ("person", "bicycle", "car", "bus")


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return Path(kit.float_file(tmp_path / "plain.onnx"))


@pytest.fixture
def int8(tmp_path: Path) -> Path:
    return Path(kit.int8_file(tmp_path / "eight.onnx"))


def checks(new: Path | FileFacts, old: Path | FileFacts, f1: float = 60.0) -> dict[str, Check]:
    both = [one if isinstance(one, FileFacts) else file_facts(one) for one in (new, old)]
    return {check.name: check for check in structure_checks(both[0], both[1], f1)}


def failed(found: dict[str, Check]) -> list[str]:
    return [name for name, check in found.items() if check.outcome != "pass"]


@pytest.mark.parametrize(
    ("new", "words"),
    [
        (("background", "person", "bicycle", "car"), "off by one (+1)"),
        (("background", *OLD), "off by one (+1)"),
        (("bicycle", "car", "bus", "person"), "off by one (-1)"),
        (("bicycle", "car", "bus"), "off by one (-1)"),
        (("bicycle", "person", "car", "bus"), "permuted, 2 names moved"),
        ((*OLD, "dog"), "1 classes more at the end"),
        (("person", "bicycle", "dog", "bus"), "1 names missing, 1 new ones"),
    ],
)
def test_another_class_map_fails_and_is_told_as_what_it_is(
    new: tuple[str, ...], words: str
) -> None:
    check = class_map_check(new, OLD)
    assert check.outcome == "fail"
    assert words in check.reason
    assert class_map_check(OLD, OLD).outcome == "pass"
    assert class_map_check(("motorbike",), ("motorcycle",)).outcome == "pass"  # one class


def test_another_family_is_refused(int8: Path) -> None:
    spec = file_facts(int8).spec
    check_family(spec, spec.classes)
    with pytest.raises(InputError, match="expected a model of the same classes, found 0 shared"):
        check_family(spec, OLD)


def test_a_file_against_itself_passes(int8: Path) -> None:
    assert failed(checks(int8, int8)) == []


@pytest.mark.parametrize(
    ("changes", "name", "words"),
    [
        ({"color": "bgr"}, "pre-processing", "color bgr (old rgb)"),
        ({"resize": "letterbox_center"}, "pre-processing", "resize letterbox_center (old stretch)"),
        ({"mean": (0, 0, 0)}, "pre-processing", "mean (0, 0, 0) (old (100, 110, 120))"),
        ({"std": (55, 65, 75)}, "pre-processing", "std (55, 65, 75)"),
        ({"nms_iou": 1.0}, "post-processing", "nms_iou 1 (old 0.6)"),
    ],
)
def test_another_spec_fails_unless_the_boxes_agree(
    plain: Path, tmp_path: Path, changes: dict[str, Any], name: str, words: str
) -> None:
    other = kit.respec(plain, tmp_path / "other.onnx", **changes)
    found = checks(other, plain)
    assert failed(found) == [name]
    assert words in found[name].reason
    assert "only 60 % agree" in found[name].reason
    assert failed(checks(other, plain, 98.0)) == []


def test_folded_pre_processing_is_not_another_one(plain: Path) -> None:
    old = file_facts(plain)
    spec = old.spec.with_changes(
        input_format="uint8_nhwc", color="bgr", mean=(0, 0, 0), std=(1, 1, 1)
    )
    found = checks(replace(old, spec=spec), old)
    assert failed(found) == []
    assert "folded" in found["pre-processing"].reason
    stretched = replace(old, spec=spec.with_changes(resize="letterbox_topleft"))
    assert failed(checks(stretched, old)) == ["pre-processing"]


def test_another_architecture_has_its_own_spec(plain: Path) -> None:
    old = file_facts(plain)
    spec = old.spec.with_changes(head="yolov8", nms_iou=0.7, color="bgr")
    assert failed(checks(replace(old, spec=spec), old)) == []


def test_another_input_size_only_informs(plain: Path) -> None:
    old = file_facts(plain)
    new = replace(old, spec=old.spec.with_changes(input_hw=(32, 64)))
    check = checks(new, old)["input size"]
    assert not check.required
    assert check.reason == "64x32 px, before 64x64"


def test_int8_that_runs_in_float_is_caught(plain: Path, int8: Path, tmp_path: Path) -> None:
    found = checks(plain, int8)
    assert failed(found) == ["runs as integers"]
    assert "0 of 9 convolutions run as integers here, 9 of 9" in found["runs as integers"].reason
    named = tmp_path / "detector_int8.onnx"
    named.write_bytes(plain.read_bytes())
    assert "its file name is" in checks(named, plain)["runs as integers"].reason
    noted = kit.respec(plain, tmp_path / "noted.onnx", more={"quantization": "static"})
    assert failed(checks(noted, plain)) == ["runs as integers"]
    assert failed(checks(plain, plain)) == []
    assert failed(checks(int8, plain)) == []


def test_eight_bits_that_run_in_float_on_this_machine_are_caught(
    int8: Path, tmp_path: Path
) -> None:
    def drop_rounding(model: Any) -> None:  # none after a convolution: no integer convolution
        convs = {n.output[0] for n in model.graph.node if n.op_type == "Conv"}
        made = {n.input[0]: n.output[0] for n in model.graph.node if n.op_type == "QuantizeLinear"}
        instead = {}
        for node in model.graph.node:
            if node.op_type == "DequantizeLinear":
                for source in convs & made.keys():
                    if node.input[0] == made[source]:
                        instead[node.output[0]] = source
        for node in model.graph.node:
            for place, name in enumerate(node.input):
                node.input[place] = instead.get(name, name)

    found = checks(kit.edited(int8, tmp_path / "x.onnx", drop_rounding), int8)
    assert "runs as integers" in failed(found)
    assert "quantizers" in found["runs as integers"].figures["new"]["claim"]


def test_a_quantized_head_tail_is_caught(int8: Path, tmp_path: Path) -> None:
    found = checks(kit.quantized_tail(int8, tmp_path / "tail.onnx"), int8)
    assert "head tail" in failed(found)
    assert "1 operators of it in 8 bits (Concat" in found["head tail"].reason
    both = file_facts(tmp_path / "tail.onnx")
    assert failed(checks(both, both)) == []  # the last good one was so


def test_per_tensor_weights_are_caught(int8: Path, tmp_path: Path) -> None:
    found = checks(kit.per_tensor(int8, tmp_path / "coarse.onnx"), int8)
    assert "weight scales" in failed(found)
    assert "only one for the whole tensor in 8 of 8" in found["weight scales"].reason
    assert failed(checks(int8, tmp_path / "coarse.onnx")) == []


@pytest.mark.parametrize(("photos", "outcome"), [(3, "fail"), (300, "pass")])
def test_few_calibration_photos_are_caught_where_the_file_tells(
    int8: Path, tmp_path: Path, photos: int, outcome: str
) -> None:
    more = {FACTS_KEY: json.dumps({"photos": photos})}
    found = checks(kit.respec(int8, tmp_path / "told.onnx", more=more), int8)
    assert found["calibration"].outcome == outcome
    assert "calibration" not in checks(int8, int8)


@pytest.mark.parametrize("which", ["int8", "plain", "shipped", "float"])
def test_the_reader_sees_what_the_package_onnx_sees(which: str, int8: Path, plain: Path) -> None:
    paths = {"int8": int8, "plain": plain, "shipped": shipped(), "float": shipped_float()}
    model, graph = onnx.load(paths[which]), read_graph(paths[which])
    assert [(n.op, n.inputs, n.outputs) for n in graph.nodes] == [
        (n.op_type, tuple(n.input), tuple(n.output)) for n in model.graph.node
    ]
    stored = {t.name: tuple(t.dims) for t in model.graph.initializer}
    assert {name: graph.stored[name] for name in stored} == stored
    assert graph.metadata == {p.key: p.value for p in model.metadata_props}
    assert graph.outputs == tuple(o.name for o in model.graph.output)
    assert quantized_tail(graph) == ()
    assert (quantizers(graph) > 0) == (which in ("int8", "shipped"))
    assert convolutions(graph)[1] == sum(n.op_type == "Conv" for n in model.graph.node)
    assert (weight_scales(graph)[0] > 0) == (which in ("int8", "shipped"))


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9])
def test_a_truncated_file_is_refused(int8: Path, part: float) -> None:
    data = int8.read_bytes()
    int8.write_bytes(data[: int(part * len(data))])
    with pytest.raises(ModelFileError, match="expected an ONNX model, found"):
        file_facts(int8)
    with pytest.raises(ModelFileError, match="no such file"):
        read_graph(int8.with_name("none.onnx"))


def test_facts_survive_json_and_are_checked(int8: Path) -> None:
    facts = file_facts(int8)
    values = json.loads(json.dumps(facts.to_json()))
    assert FileFacts.from_json(values) == facts
    for key, wrong in (
        ("bytes", -1), ("integer", "9"), ("spec", {"head": "yolox"}), ("tail", 5), ("name", 5),
        ("claim", []), ("calibration_photos", "3"), ("more", 1),
    ):  # fmt: skip
        with pytest.raises(InputError, match="expected the facts of a model file"):
            FileFacts.from_json({**values, key: wrong})
    for wrong in (None, [], "x", {}):
        with pytest.raises(InputError):
            FileFacts.from_json(wrong)
