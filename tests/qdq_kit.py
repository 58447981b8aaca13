"""Small float graphs, their QDQ form on plain grids, and what ONNX Runtime makes of them."""

from __future__ import annotations

import runpy
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import onnx
from edgesight.compression.calibrate import Grid
from edgesight.compression.onnx_io import tidy
from edgesight.compression.qdq import insert, plan_layout
from edgesight.models.engines import OrtNet
from onnx import TensorProto, helper

graphs: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny_graphs.py"))))


def noise_photos(folder: Path, count: int) -> list[Path]:
    """Writes small pictures of smooth noise."""
    found = []
    for number in range(count):
        image = np.random.default_rng(number).integers(0, 256, (80, 96, 3), dtype=np.uint8)
        found.append(folder / f"{number}.png")
        cv2.imwrite(str(found[-1]), cv2.GaussianBlur(image, (9, 9), 0))
    return found


def graph_of(build: Any, end: str, shape: list[int]) -> Any:
    """A model of ``GraphBuilder``'s nodes; reads ``x``, 8 channels of 16x16."""
    output = build.add("Neg", [end])  # the head's tail: it stays in float
    graph = helper.make_graph(
        build.nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 16, 16])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)],
        build.stored,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def opened(model: Any, folder: Path) -> tuple[Any, list[str]]:
    """Opens a model as a detector's is opened; returns the operators that run, too."""
    path = folder / "model.onnx"
    onnx.save(model, path)
    runner = OrtNet(path, optimized_path=folder / "optimised.onnx").session
    return runner, [n.op_type for n in onnx.load(folder / "optimised.onnx").graph.node]


def quantized(model: Any, in_float: Sequence[str] = (), low: float = -4.0) -> Any:
    layout = plan_layout(model, in_float)
    relus = {out for n in model.graph.node if n.op_type == "Relu" for out in n.output}
    positive = {layout.group[name] for name in layout.tensors if name in relus}
    grids = {g: Grid.over(0.0 if g in positive else low, 4.0) for g in layout.group.values()}
    return insert(model, layout, grids, signed=False)


def silu_graph() -> Any:
    build = graphs.GraphBuilder()
    first = build.silu(build.conv("x", (8, 16), 3))
    end = build.conv(build.silu(build.conv(first, (16, 16), 3, stride=2)), (16, 8))
    return tidy(graph_of(build, end, [1, 8, 8, 8]))
