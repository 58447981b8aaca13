"""Model files with faults, and labelled photos, for the tests of the regression gate."""

from __future__ import annotations

import json
import runpy
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import onnx
from edgesight.compression.calibrate import Grid
from edgesight.compression.onnx_io import save_model, tidy
from edgesight.compression.qdq import insert, plan_layout
from edgesight.models.dataset import load_image
from edgesight.models.detections import Detections
from edgesight.models.detector import OnnxDetector
from edgesight.models.spec import METADATA_KEY, ModelSpec
from onnx import helper, numpy_helper

ROOT = Path(__file__).parent.parent
SAMPLES = ROOT / "device_app" / "samples"
graphs: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny_graphs.py"))))


def float_file(path: Path) -> Path:
    """A small float detector with convolutions."""
    save_model(tidy(graphs.detector("leaky")), path, graphs.SPEC)
    return path


def int8_file(path: Path) -> Path:
    """The same, quantized as ``compress`` does."""
    model = tidy(graphs.detector("leaky"))
    layout = plan_layout(model)
    grids = {name: Grid.over(-4, 4) for name in set(layout.group.values())}
    save_model(insert(model, layout, grids, signed=False), path, graphs.SPEC)
    return path


def edited(source: Path, target: Path, edit: Callable[[Any], None]) -> Path:
    """Writes a file with its model changed."""
    model = onnx.load(source)
    edit(model)
    onnx.save(model, target)
    return target


def respec(source: Path, target: Path, **changes: Any) -> Path:
    """Writes the same network with another spec; ``more`` is other metadata."""
    more = changes.pop("more", {})

    def edit(model: Any) -> None:
        stored = {p.key: p.value for p in model.metadata_props}
        spec = ModelSpec.from_json(stored[METADATA_KEY]).with_changes(**changes)
        del model.metadata_props[:]
        helper.set_model_props(model, {**stored, METADATA_KEY: spec.to_json(), **more})

    return edited(source, target, edit)


def quantized_tail(source: Path, target: Path) -> Path:
    """Rounds what the last concatenation gives to 8 bits: boxes and scores on one scale."""

    def edit(model: Any) -> None:
        concat = [n for n in model.graph.node if n.op_type == "Concat"][-1]
        name = concat.output[0]
        concat.output[0] = "before_rounding"
        for key, value in (("one_scale", np.float32(2)), ("no_shift", np.uint8(0))):
            model.graph.initializer.append(numpy_helper.from_array(np.array(value), key))
        grid = ["one_scale", "no_shift"]
        place = list(model.graph.node).index(concat) + 1
        rounding = [
            helper.make_node("QuantizeLinear", ["before_rounding", *grid], ["eight"], "tail_q"),
            helper.make_node("DequantizeLinear", ["eight", *grid], [name], "tail_dq"),
        ]
        nodes = list(model.graph.node)
        nodes[place:place] = rounding
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del model.graph.node[:]
        model.graph.node.extend(copies)

    return edited(source, target, edit)


def per_tensor(source: Path, target: Path) -> Path:
    """Gives each convolution's weights one scale."""

    def edit(model: Any) -> None:
        stored = {t.name: t for t in model.graph.initializer}
        for number, node in enumerate(model.graph.node):
            if node.op_type != "DequantizeLinear" or node.input[1] not in stored:
                continue
            scale = numpy_helper.to_array(stored[node.input[1]])
            if scale.size < 2:
                continue
            names = [f"scale_{number}", *([f"zero_{number}"] if node.input[2:] else [])]
            zero = stored.get(node.input[2]) if node.input[2:] else None
            kind = np.int8 if zero is None else numpy_helper.to_array(zero).dtype
            values = [np.array(scale.max(), np.float32), np.array(0, kind)]
            for name, value in zip(names, values, strict=False):
                model.graph.initializer.append(numpy_helper.from_array(value, name))
            del node.input[1:]
            node.input.extend(names)
            del node.attribute[:]

    return edited(source, target, edit)


def memory_hog(source: Path, target: Path, megabytes: int = 150) -> Path:
    """Fills so much memory at each inference, and changes nothing."""

    def edit(model: Any) -> None:
        graph = model.graph
        name = graph.output[0].name
        last = next(n for n in graph.node if name in n.output)
        last.output[list(last.output).index(name)] = "lean"
        count = numpy_helper.from_array(np.array([megabytes * 250_000], np.int64), "many")
        graph.initializer.append(count)
        axes = numpy_helper.from_array(np.array([0], np.int64), "all_axes")
        graph.initializer.append(axes)
        zero = numpy_helper.from_array(np.zeros(1, np.float32))
        graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), "first"))
        graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "flat_one"))
        graph.node.extend(
            [
                helper.make_node("ConstantOfShape", ["many"], ["field"], value=zero),
                helper.make_node("ReduceMax", ["lean"], ["peak"], keepdims=0),
                helper.make_node("Mul", ["peak", "first"], ["nothing"]),
                helper.make_node("Add", ["field", "nothing"], ["moved"]),  # not known beforehand
                helper.make_node("ReduceMin", ["moved"], ["least"], keepdims=0),
                helper.make_node("Add", ["lean", "least"], [name]),
            ]
        )

    return edited(source, target, edit)


def label(folder: Path, photos: Iterable[Path], detector: Path, score_min: float = 0.35) -> Path:
    """Makes a labelled folder of photos; a detector's boxes are the true ones."""
    network = OnnxDetector(detector)
    classes = network.spec.classes
    (folder / "images").mkdir(parents=True)
    images: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    for number, photo in enumerate(photos, 1):
        shutil.copy(photo, folder / "images" / photo.name)
        picture = load_image(photo)
        height, width = picture.shape[:2]
        entry = {"id": number, "file_name": photo.name, "width": width, "height": height}
        images.append(entry)
        for box, _, kind in network(picture, score_min):
            left, top, right, bottom = map(float, box)
            if right - left < 1 or bottom - top < 1:
                continue
            place = [left, top, right - left, bottom - top]
            boxes.append(
                {
                    "id": len(boxes) + 1,
                    "image_id": number,
                    "category_id": kind + 1,
                    "bbox": place,
                    "area": place[2] * place[3],
                    "iscrowd": 0,
                }
            )
    categories = [{"id": i, "name": name} for i, name in enumerate(classes, 1)]
    content = {"images": images, "annotations": boxes, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))
    return folder


def boxes_of(rows: list[tuple[float, float, float, float, float, int]]) -> Detections:
    """Detections from rows of left, top, right, bottom, score, label."""
    table = np.array(rows, np.float32).reshape(-1, 6)
    return Detections(table[:, :4], table[:, 4], table[:, 5].astype(np.int64))


def more_photos(folder: Path, count: int) -> list[Path]:
    """Writes the sample photos, mirrored and cut, until there are so many."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    sources = [cv2.imread(str(path)) for path in sorted(SAMPLES.glob("*.jpg"))]
    found = []
    for number in range(count):
        image = sources[number % len(sources)]
        height, width = image.shape[:2]
        if number >= len(sources):
            left, top = int(width * random.uniform(0, 0.2)), int(height * random.uniform(0, 0.2))
            image = image[top:, left:]
            image = image[:, ::-1] if number % 2 else image
        scale = 320 / max(image.shape[:2])
        small = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        found.append(folder / f"{number:03}.png")
        assert cv2.imwrite(str(found[-1]), small)
    return found
