from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from edgesight.compression.slim import shorten_names
from onnx import TensorProto, helper, numpy_helper


def model() -> Any:
    """x -> long name -> y, with a tensor already named as the first short name would be."""
    nodes = [
        helper.make_node("Mul", ["x", "a/very/long/path/weight"], ["a/very/long/path/out"], "m/1"),
        helper.make_node("Add", ["a/very/long/path/out", "0"], ["y"], "m/2"),
        helper.make_node("Clip", ["y", "", "a/very/long/path/weight"], ["1"], "m/3"),
    ]
    weights = [
        numpy_helper.from_array(np.float32(3), "a/very/long/path/weight"),
        numpy_helper.from_array(np.float32(2), "0"),
    ]
    sides = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y", "1")
    ]
    graph = helper.make_graph(nodes, "g", sides[:1], sides[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_short_names_compute_the_same_and_keep_inputs_and_outputs(tmp_path: Path) -> None:
    before, after = model(), model()
    shorten_names(after)
    onnx.checker.check_model(after)
    assert after.ByteSize() < before.ByteSize() - 60
    results = []
    for made in (before, after):
        session = ort.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
        results.append(session.run(["y", "1"], {"x": np.array([1, -4], np.float32)}))
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)
