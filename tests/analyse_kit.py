"""Small graphs out of single operators, for the tests of ``edgesight analyse``."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper


def graph(
    nodes: list[Any],
    stored: dict[str, Any],
    shape: list[Any],
    output: str = "out",
    opset: int = 17,
    domains: tuple[str, ...] = (),
) -> Any:
    made = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("in", TensorProto.FLOAT, shape)],
        [helper.make_empty_tensor_value_info(output)],
        [numpy_helper.from_array(value, name) for name, value in stored.items()],
    )
    made.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    opsets = [helper.make_opsetid(name, 1) for name in domains]
    return helper.make_model(
        made, ir_version=8, opset_imports=[helper.make_opsetid("", opset), *opsets]
    )


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)
