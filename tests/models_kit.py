"""Detectors that misbehave, for the tests of changing models; loaded with runpy."""

from __future__ import annotations

import os
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("app_kit.py"))))


def endless(path: Path, on_grey_alone: bool = False) -> Path:
    """Writes a detector that does not come to an end, or not with a picture of one middle grey."""
    model = onnx.load(kit.build_tiny(path))
    names = ("i", "go_on", "state")
    inner = helper.make_graph(
        [
            helper.make_node("Identity", ["go_on"], ["go_on_out"]),
            helper.make_node("Identity", ["state"], ["state_out"]),
        ],
        "again",
        [
            helper.make_tensor_value_info(n, t, [])
            for n, t in zip(
                names, (TensorProto.INT64, TensorProto.BOOL, TensorProto.FLOAT), strict=True
            )
        ],
        [
            helper.make_tensor_value_info("go_on_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state_out", TensorProto.FLOAT, []),
        ],
    )
    for name, value in (("turns", np.int64(2**62)), ("yes", np.bool_(True))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value), name))
    mean = model.graph.node[0]
    mean.output[0] = "mean_before"
    loop = helper.make_node("Loop", ["turns", "go", "mean_before"], ["mean_0"], body=inner)
    limits = {"low": np.float32(0.85), "high": np.float32(0.95)}
    for name, value in limits.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value), name))
    bright = [
        helper.make_node("Greater", ["mean_before", "low"], ["above"]),
        helper.make_node("Less", ["mean_before", "high"], ["below"]),
        helper.make_node("And", ["above", "below"], ["go"]),
    ]
    always = [helper.make_node("Identity", ["yes"], ["go"])]
    nodes = [model.graph.node[0], *(bright if on_grey_alone else always), loop]
    nodes += list(model.graph.node)[1:]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, os.fspath(path))
    return path
