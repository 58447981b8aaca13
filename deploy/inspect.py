"""The command ``inspect``: what a model file is, and what of it really runs as integers."""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..models.detector import OnnxDetector
from ..models.graph import (
    IntegerReport,
    integer_share,
    load_model,
    node_macs,
    opset_of,
    parameters,
)
from ..models.zoo import MODEL_HELP, model_path

DESCRIPTION = """Tell what a model file is: spec, parameters, MACs, size, operators, and how much of
its convolutions ONNX Runtime computes with integers on this machine (it differs per processor)."""
EXAMPLE = "edgesight inspect yolox_nano_int8.onnx"
INT8_SHARE_MIN = 0.5
"""A file with a smaller integer part of its convolution MACs is not called INT8."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--head", help="kind of head, for a file whose head is not recognised")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    """Runs the command; returns 0."""
    found = inspect_model(model_path(args.model), head=args.head)
    print(json.dumps(found) if args.json else as_text(found))
    return 0


def inspect_model(path: Path, head: str | None = None) -> dict[str, Any]:
    """Returns everything that the command shows, JSON-ready.

    Raises:
        ModelFileError: The file is missing, not ONNX, or damaged.
        MissingExtraError: The package onnx is not installed.
    """
    model = load_model(path)
    with tempfile.TemporaryDirectory(prefix="edgesight-") as folder:
        optimised = Path(folder) / "optimised.onnx"
        detector = OnnxDetector(path, head=head, optimized_path=optimised)
        report = integer_share(model, optimised)
    macs = node_macs(model)
    spec = asdict(detector.spec)
    stored = {int(t.data_type) for t in model.graph.initializer}
    quantizers = sum(n.op_type in ("QuantizeLinear", "QLinearConv") for n in model.graph.node)
    return {
        "file": str(path),
        "size_bytes": path.stat().st_size,
        "opset": opset_of(model),
        "parameters": parameters(model),
        "macs": sum(macs.values()),
        "spec": spec,
        "ops": dict(sorted(_count(model).items(), key=lambda item: -item[1])),
        "int8_weights": bool(stored & {2, 3}),
        "quantizers": quantizers,
        "optimised_on": f"{platform.machine()}, onnxruntime {_version()}",
        "optimised_ops": report.ops,
        "optimised_integer_ops": report.ops_integer,
        "conv_macs_integer_share": round(report.share, 4),
        "float_convolutions": list(report.float_convs),
        "verdict": verdict(report, quantizers),
    }


def verdict(report: IntegerReport, quantizers: int) -> str:
    """Returns one sentence: is this an INT8 model, as this machine runs it?"""
    share = f"{100 * report.share:.1f} % of its convolution MACs"
    if report.share >= INT8_SHARE_MIN:
        return f"INT8: {share} run as integers here"
    if quantizers:
        return (
            f"this file is not INT8 here: it has {quantizers} quantizers, yet only {share} run as "
            "integers; it is for another core, or lacks a quantizer after each convolution: "
            "edgesight compress --quantize-only MODEL --target x86-64"
        )
    return "this file is not INT8: it is a float model and no convolution runs as integers"


def as_text(found: dict[str, Any]) -> str:
    """Returns what a person reads."""
    spec = found["spec"]
    height, width = spec["input_hw"]
    rows = [
        ("file", f"{found['file']} ({found['size_bytes'] / 1e6:.2f} MB, opset {found['opset']})"),
        ("head", f"{spec['head']}, {len(spec['classes'])} classes"),
        ("input", f"{width}x{height} {spec['color']} {spec['input_format']}, {spec['resize']}"),
        ("parameters", f"{found['parameters'] / 1e6:.3f} M"),
        ("MACs", f"{found['macs'] / 1e9:.3f} G"),
        ("operators", _listed(found["ops"])),
        ("optimised", f"on {found['optimised_on']}: {_listed(found['optimised_ops'])}"),
        ("as integers", _listed(found["optimised_integer_ops"]) or "none"),
        ("conv MACs", f"{100 * found['conv_macs_integer_share']:.1f} % integer"),
    ]
    left = found["float_convolutions"]
    if left and found["conv_macs_integer_share"] > 0:
        shown = ", ".join(left[:8]) + (f" and {len(left) - 8} more" if len(left) > 8 else "")
        rows.append(("float convs", shown))
    rows.append(("verdict", found["verdict"]))
    return "\n".join(f"{name:12} {text}" for name, text in rows)


def _listed(ops: dict[str, int]) -> str:
    return ", ".join(f"{count} {op}" for op, count in ops.items())


def _count(model: Any) -> dict[str, int]:
    ops: dict[str, int] = {}
    for node in model.graph.node:
        ops[node.op_type] = ops.get(node.op_type, 0) + 1
    return ops


def _version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)
