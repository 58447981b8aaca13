"""Classifiers: their head, their linear layers as convolutions, and the tutorial's example."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
import torch
from edgesight.compression.augment import augment
from edgesight.compression.cut import chosen_groups, cut, masked
from edgesight.compression.distill import output_loss
from edgesight.compression.enter import enter_onnx
from edgesight.compression.foreign import ForeignNet
from edgesight.compression.groups import find_groups
from edgesight.compression.levels import layout_of
from edgesight.compression.linear import linear_as_convs
from edgesight.compression.onnx_io import save_model, tidy
from edgesight.compression.pipeline import RunResult, run_recipe
from edgesight.compression.recipe import make_recipe, read_recipe
from edgesight.models.detector import OnnxDetector, decode
from edgesight.models.errors import ModelFileError, RecipeError
from edgesight.models.preprocess import Placement
from edgesight.models.recognise import read_spec
from edgesight.models.spec import ModelSpec
from onnx import TensorProto, helper, numpy_helper

HERE = Path(__file__).parent
EXAMPLE = HERE.parent / "examples" / "digits"
SIDE = 16
CLASSES = ("a", "b", "c", "d")
SPEC = ModelSpec(
    "classify", (SIDE, SIDE), CLASSES, "rgb", std=(255.0,) * 3, resize="stretch", strides=(8192,)
)
pytestmark = pytest.mark.usefixtures("one_thread")


def classic(path: Path, keras: bool = False, softmax: bool = False) -> Path:
    """Writes a random classic CNN; as Keras' converters do it: channels last before flattening."""
    random = np.random.default_rng(0)
    stored: list[Any] = []

    def store(name: str, *shape: int) -> str:
        value = random.normal(0, (2 / np.prod(shape[1:])) ** 0.5, shape).astype(np.float32)
        stored.append(numpy_helper.from_array(value, name))
        return name

    node = helper.make_node
    nodes = [
        node("Conv", ["image", store("w1", 8, 3, 5, 5), store("b1", 8)], ["c1"]),
        node("Relu", ["c1"], ["r1"]),
        node("MaxPool", ["r1"], ["p1"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", ["p1", store("w2", 12, 8, 3, 3), store("b2", 12)], ["c2"]),
        node("Relu", ["c2"], ["map"]),
    ]
    wide, hidden = 12 * 4 * 4, 8
    if keras:
        stored.append(numpy_helper.from_array(np.array([-1, wide], np.int64), "shape"))
        nodes += [
            node("Transpose", ["map"], ["last"], perm=[0, 2, 3, 1]),
            node("Reshape", ["last", "shape"], ["flat"]),
            node("MatMul", ["flat", store("w3", wide, hidden)], ["m3"]),
            node("Add", ["m3", store("b3", hidden)], ["f3"]),
            node("Relu", ["f3"], ["r3"]),
            node("MatMul", ["r3", store("w4", hidden, 4)], ["m4"]),
            node("Add", ["m4", store("b4", 4)], ["logits"]),
        ]
    else:
        nodes += [
            node("Flatten", ["map"], ["flat"]),
            node(
                "Gemm", ["flat", store("w3", hidden, wide), store("b3", hidden)], ["f3"], transB=1
            ),
            node("Relu", ["f3"], ["r3"]),
            node("Gemm", ["r3", store("w4", 4, hidden), store("b4", 4)], ["logits"], transB=1),
        ]
    last = "logits"
    if softmax:
        nodes.append(node("Softmax", ["logits"], ["likely"]))
        last = "likely"
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "classic",
        [info("image", TensorProto.FLOAT, [1, 3, SIDE, SIDE])],
        [info(last, TensorProto.FLOAT, [1, 4])],
        stored,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    save_model(model, path, SPEC)
    return path


# -- the head


def test_its_box_is_the_whole_picture_and_its_scores_are_a_softmax() -> None:
    place = Placement((0.5, 0.25), (0, 0), (2 * SIDE, 4 * SIDE))
    logits = np.array([[1.0, 3.0, -2.0, 2.0]], np.float32)
    likely = np.exp(logits[0]) / np.exp(logits[0]).sum()
    for raw in (logits, likely[None]):  # with and without a softmax in the network
        found = decode([raw], SPEC, place, score_min=0.05)
        assert found.label.tolist() == [1, 3, 0]  # the best first, the fourth is below the floor
        np.testing.assert_allclose(found.score, likely[[1, 3, 0]], rtol=1e-5)
        assert (found.xyxy == [0, 0, 2 * SIDE, 4 * SIDE]).all()


def test_a_network_without_a_word_is_not_taken_for_a_classifier() -> None:
    shapes: Any = ({"image": (1, 3, 28, 28)}, {"y": (1, 10)}, {})
    with pytest.raises(ModelFileError, match=r"known head.*found y \[1, 10\].*classify"):
        read_spec(*shapes)
    spec = read_spec(*shapes, head="classify")
    assert (spec.input_hw, len(spec.classes)) == ((28, 28), 10)
    assert read_spec(*shapes[:2], {"edgesight.spec": spec.to_json()}) == spec


# -- linear layers


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("keras", [False, True])
def test_linear_layers_come_in_as_convolutions(tmp_path: Path, keras: bool, softmax: bool) -> None:
    path = classic(tmp_path / "net.onnx", keras, softmax)
    net, _ = enter_onnx(path)  # compares with ONNX Runtime, and raises if they differ
    convs = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [(c.out_channels, c.kernel_size) for c in convs] == [
        (8, (5, 5)),
        (12, (3, 3)),
        (8, (4, 4)),
        (4, (1, 1)),
    ]
    assert layout_of(net).choice
    image = np.random.default_rng(1).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    detector = OnnxDetector(path)
    tensor, _ = detector.preprocess(image)
    with torch.no_grad():
        ours = net.export_forward(torch.from_numpy(tensor)).numpy()
    np.testing.assert_allclose(ours, detector.infer(tensor)[0], atol=1e-5)


def test_a_linear_layer_that_reads_half_of_a_map_stays(tmp_path: Path) -> None:
    model = tidy(onnx.load(classic(tmp_path / "net.onnx")))
    (flatten,) = (n for n in model.graph.node if n.op_type in ("Flatten", "Reshape"))
    half = helper.make_node("Slice", ["whole", "from", "to", "axis"], [flatten.output[0]], "half")
    flatten.output[0] = "whole"
    place = list(model.graph.node).index(flatten) + 1
    model.graph.node.insert(place, half)
    for name, value in (("from", 0), ("to", 96), ("axis", 1)):
        model.graph.initializer.append(numpy_helper.from_array(np.array([value]), name))
    (weight,) = (t for t in model.graph.initializer if tuple(t.dims) in ((8, 192), (192, 8)))
    values = numpy_helper.to_array(weight)
    values = values[:, :96] if values.shape[1] == 192 else values[:96]
    weight.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), weight.name))
    kinds = [n.op_type for n in linear_as_convs(model).graph.node]
    assert kinds.count("Gemm") == 2
    assert kinds.count("Conv") == 2


def test_a_linear_layer_can_be_cut(tmp_path: Path) -> None:
    net, spec = enter_onnx(classic(tmp_path / "net.onnx", keras=True))
    example = torch.zeros(1, 3, *spec.input_hw)
    channels = find_groups(net, example)
    names = [name for name, m in net.named_modules() if isinstance(m, torch.nn.Conv2d)]
    assert {m for g in channels.groups for m, _ in g.makers} == set(names[:3])
    chosen = chosen_groups(channels, {names[1]: [2, 5], names[2]: [0, 7]})
    small, zeroed = cut(net, channels, chosen), masked(net, channels, chosen)
    x = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(small(x)[0], zeroed(x)[0])
    assert small.get_submodule(names[2]).weight.shape == (6, 10, 4, 4)


# -- learning


@pytest.fixture
def net(tmp_path: Path) -> ForeignNet:
    return enter_onnx(classic(tmp_path / "net.onnx"))[0]


def test_the_loss_compares_choices_and_not_yes_or_no(net: ForeignNet) -> None:
    random = torch.Generator().manual_seed(0)
    goal, other = (torch.randn(3, 4, 1, 1, generator=random) for _ in range(2))
    for temperature in (1.0, 3.0):
        assert output_loss(net, [goal], [goal], temperature)[0] == 0
        scores, boxes = output_loss(net, [goal + 5], [goal], temperature)
        assert scores.abs() < 1e-5  # the same choice, however large its logits
        assert boxes == 0
        assert output_loss(net, [other], [goal], temperature)[0] > 0.01


def test_pictures_of_a_classifier_are_not_mirrored() -> None:
    image = np.zeros((28, 28, 3), np.uint8)
    image[:, 20:] = 255

    def lighter_left(spec: ModelSpec) -> int:
        pictures = [augment(image, np.random.default_rng(i), spec)[0] for i in range(40)]
        halves = [(p[:, : p.shape[1] // 2], p[:, p.shape[1] // 2 :]) for p in pictures]
        return sum(left.mean() > right.mean() for left, right in halves)

    assert lighter_left(SPEC) == 0
    assert lighter_left(SPEC.with_changes(head="yolox")) > 10


# -- the tutorial's example


def load_example() -> Any:
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location("digits_example", EXAMPLE / "digits.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The example's folder, with less training and fewer pictures to measure on."""
    example = load_example()
    folder = tmp_path_factory.mktemp("digits")
    example.FOLDER, example.TEST = folder, 200
    example.NETS = {"big": (16, 32, 96, 5), "small": (16, 32, 64, 4)}
    example.main([])
    return folder, example


@pytest.fixture(scope="module")
def result(digits: tuple[Path, Any]) -> RunResult:
    folder, _ = digits
    recipe = read_recipe(EXAMPLE / "recipe.toml")
    values = recipe.model_dump(mode="json", exclude_none=True)
    values["out"], values["model"] = str(folder / "out"), {"file": str(folder / "small.onnx")}
    values["data"] = {
        "photos": str(folder / "learn"),
        "eval": str(folder / "test"),
        "step_photos": 0,
    }
    for step in values["steps"]:
        changes = {
            "prune": {"macs_ratio": 0.25, "align": 4},
            "distill": {"photos": 1600, "batch": 32, "teacher": str(folder / "big.onnx")},
            "quantize": {"photos": 48},
            "verify": {"resamples": 40, "latency_rounds": 0, "photos_max": 100},
        }[step["kind"]]
        kind = step["kind"]
        step.clear()
        step.update(kind=kind, **changes)
    return run_recipe(make_recipe(values, folder), progress=False, say=lambda line: None)


def test_the_example_makes_it_small_and_it_still_reads(
    digits: tuple[Path, Any], result: RunResult
) -> None:
    folder, example = digits
    before, count = example.hits(folder / "small.onnx", folder / "test")
    after, _ = example.hits(result.final, folder / "test")
    assert count == 200
    assert before >= 180
    assert after >= before - 15
    assert result.final.stat().st_size < 0.2 * (folder / "small.onnx").stat().st_size
    ops = [n.op_type for n in onnx.load(result.final).graph.node]
    assert not {"Gemm", "MatMul"} & set(ops)  # every layer went the way of the convolutions
    assert result.verified is not None
    assert result.verified["passed"]


def test_the_big_network_teaches_score_by_score(result: RunResult) -> None:
    reports = {r.report.kind: r.report for r in result.rows if r.report is not None}
    assert reports["distill"].figures["teachers"] == ["big.onnx"]
    assert not any("only the boxes" in note for note in reports["distill"].notes)
    assert reports["prune"].figures["layers"]


def test_a_teacher_of_another_input_is_refused_in_words(tmp_path: Path) -> None:
    classic(tmp_path / "net.onnx")
    model = onnx.load(tmp_path / "net.onnx")
    save_model(model, tmp_path / "blue.onnx", SPEC.with_changes(color="bgr"))
    (tmp_path / "photos").mkdir()
    for i in range(4):
        cv2.imwrite(str(tmp_path / "photos" / f"{i}.png"), np.full((16, 16, 3), 50 * i, np.uint8))
    values = {
        "version": 1,
        "model": {"file": "net.onnx"},
        "data": {"photos": "photos", "step_photos": 0},
        "steps": [{"kind": "distill", "photos": 4, "teacher": "blue.onnx"}],
        "out": "out",
    }
    with pytest.raises(RecipeError, match=r"classifier with the detector's classes.*blue\.onnx"):
        run_recipe(make_recipe(values, tmp_path), progress=False, say=lambda line: None)
