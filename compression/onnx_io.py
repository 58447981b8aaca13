"""ONNX files in and out: checked, written whole or not at all, with the spec inside."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ..models.errors import ModelFileError
from ..models.files import atomic_path
from ..models.graph import copied, load_model, opset_of, require_onnx, set_nodes
from ..models.spec import METADATA_KEY, ModelSpec

FOCUS_FUSION = "SliceConcatToSpaceToDepthFusion"
"""A pass of ONNX Runtime 1.32 that hides YOLOX's Focus in an operator that converters do not know;
earlier versions have none of that name, and pass over it."""
OPSET = 17
"""Has what quantization needs, and every ONNX Runtime of a board reads it."""
OPSET_MAX = 20
IR_VERSION = 8
PREPARING = ("image_cast", "image_planes", "image_color", "image_sub", "image_div")
"""Names of the nodes that ``fold_preprocess`` puts in front."""


def write_spec(model: Any, spec: ModelSpec) -> None:
    """Stores the spec in the model's metadata, in place of an earlier one."""
    kept = [p for p in model.metadata_props if p.key != METADATA_KEY]
    entry = require_onnx().StringStringEntryProto(key=METADATA_KEY, value=spec.to_json())
    del model.metadata_props[:]
    model.metadata_props.extend([*kept, entry])


def save_model(model: Any, path: Path | str, spec: ModelSpec | None = None) -> None:
    """Checks a model and writes it whole or not at all.

    Raises:
        ModelFileError: The graph is not valid ONNX; a defect of the step that made it.
        OutputError: The file cannot be written.
    """
    onnx = require_onnx()
    if spec is not None:
        write_spec(model, spec)
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        message = f"{path}: made an invalid ONNX graph: {' '.join(str(error).split())[:200]}"
        raise ModelFileError(message) from error
    with atomic_path(path) as temporary:
        onnx.save(model, temporary)


def tidy(model: Any) -> Any:
    """Returns the same network in a plain form that the other steps understand.

    The opset is brought to 17..20, constants are folded, and BatchNorm goes into its convolution
    (ONNX Runtime's basic optimisations, which are the same on every machine). Every node has a
    name, every convolution a bias.

    Raises:
        ModelFileError: Operators are not ONNX's own, ONNX cannot convert the opset, or ONNX Runtime
            cannot read the graph.
    """
    onnx = require_onnx()
    from onnx import version_converter

    strange = sorted({n.domain for n in model.graph.node} - {"", "ai.onnx"})
    if strange:
        message = (
            f"expected ONNX's own operators, found some of {', '.join(strange)}; export the model "
            "again, without ONNX Runtime's optimisations"
        )
        raise ModelFileError(message)
    metadata = {p.key: p.value for p in model.metadata_props}
    if not OPSET <= opset_of(model) <= OPSET_MAX:
        try:
            model = version_converter.convert_version(model, OPSET)
        except Exception as error:
            message = (
                f"expected a model that ONNX can convert from opset {opset_of(model)} to {OPSET}, "
                f"found: {' '.join(str(error).split())[:160]}; export it with opset {OPSET}"
            )
            raise ModelFileError(message) from error
    model = _fold_constants(model)
    used = {node.domain or "" for node in model.graph.node}
    domains = [o for o in model.opset_import if (o.domain or "") in used]
    del model.opset_import[:]
    model.opset_import.extend(domains)
    model.ir_version = max(model.ir_version, IR_VERSION)
    del model.graph.value_info[:]
    model.producer_name = "edgesight"
    stored = {t.name: t for t in model.graph.initializer}
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
        if node.op_type == "Conv" and len(node.input) == 2 and node.input[1] in stored:
            bias = np.zeros(stored[node.input[1]].dims[0], np.float32)
            name = f"{node.output[0]}_bias"
            model.graph.initializer.append(onnx.numpy_helper.from_array(bias, name))
            node.input.append(name)
    del model.metadata_props[:]
    model.metadata_props.extend(
        onnx.StringStringEntryProto(key=key, value=value) for key, value in metadata.items()
    )
    onnx.checker.check_model(model)
    return model


def fold_preprocess(model: Any, spec: ModelSpec) -> tuple[Any, ModelSpec]:
    """Puts everything after the resize into the graph: it then takes OpenCV's bytes as they are.

    The new input is uint8 ``(1, height, width, 3)`` BGR; colour order and normalisation follow
    inside, with the same float32 operations in the same order as ``preprocess.normalise``.

    Args:
        model: A float model whose input is float ``(1, 3, height, width)``.
        spec: Its spec.

    Returns:
        A new model and its spec; both as they were if the input already is uint8.
    """
    if spec.input_format == "uint8_nhwc":
        return model, spec
    onnx = require_onnx()
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    result = copied(model)
    graph = result.graph
    old = graph.input[0].name
    height, width = spec.input_hw
    new = "image" if old != "image" else "image_bgr"
    # Planes first: a number per channel then meets whole planes, and not pixels of three numbers,
    # which takes ONNX Runtime forty times as many instructions (a third of a small INT8 detector).
    # The last node's output keeps the name of the old input.
    steps: list[tuple[str, str, dict[str, Any], Any]] = [
        ("Cast", "image_cast", {"to": onnx.TensorProto.FLOAT}, None),
        ("Transpose", "image_planes", {"perm": [0, 3, 1, 2]}, None),
    ]
    if spec.color == "rgb":
        steps.append(("Gather", "image_color", {"axis": 1}, np.array([2, 1, 0], np.int64)))
    if any(spec.mean):
        steps.append(("Sub", "image_sub", {}, np.array(spec.mean, np.float32).reshape(1, 3, 1, 1)))
    if spec.std != (1.0, 1.0, 1.0):
        steps.append(("Div", "image_div", {}, np.array(spec.std, np.float32).reshape(1, 3, 1, 1)))
    nodes = []
    current = new
    for op, name, attributes, value in steps:
        inputs = [current]
        if value is not None:
            graph.initializer.append(numpy_helper.from_array(value, f"{name}_by"))
            inputs.append(f"{name}_by")
        current = old if name == steps[-1][1] else f"{name}_out"
        nodes.append(helper.make_node(op, inputs, [current], name, **attributes))
    set_nodes(graph, [*nodes, *graph.node])
    del graph.input[:]
    graph.input.append(
        helper.make_tensor_value_info(new, onnx.TensorProto.UINT8, [1, height, width, 3])
    )
    changed = spec.with_changes(input_format="uint8_nhwc")
    write_spec(result, changed)
    return result, changed


def _fold_constants(model: Any) -> Any:
    """Runs ONNX Runtime's basic optimisations: standard operators in, standard operators out."""
    with tempfile.TemporaryDirectory(prefix="edgesight-") as folder:
        plain = Path(folder) / "plain.onnx"
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(plain)
        options.log_severity_level = 4
        try:
            ort.InferenceSession(
                model.SerializeToString(),
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=[FOCUS_FUSION],
            )
        except Exception as error:
            message = (
                "expected a graph that ONNX Runtime can run, found: "
                f"{' '.join(str(error).split())[:160]}; export the model again"
            )
            raise ModelFileError(message) from error
        return load_model(plain)
