"""Making a file smaller without changing what it computes."""

from __future__ import annotations

import itertools
from typing import Any


def shorten_names(model: Any) -> None:
    """Gives nodes and inner tensors short names, in place; inputs and outputs keep theirs.

    Exporters write the path of a module into every name. In a small quantized network those
    paths were a seventh of the file.

    Args:
        model: ``onnx.ModelProto`` without sub-graphs that read outer tensors.
    """
    graph = model.graph
    kept = {value.name for value in (*graph.input, *graph.output)}
    names: dict[str, str] = {"": ""}
    fresh = (_base36(number) for number in itertools.count())

    def short(name: str) -> str:
        if name in kept:
            return name
        if name not in names:
            names[name] = next(n for n in fresh if n not in kept)
        return names[name]

    for number, node in enumerate(graph.node):
        node.input[:] = [short(name) for name in node.input]
        node.output[:] = [short(name) for name in node.output]
        node.name = f"n{_base36(number)}"
        node.doc_string = ""
    for tensor in graph.initializer:
        tensor.name = short(tensor.name)
        tensor.doc_string = ""
    del graph.value_info[:]


def _base36(number: int) -> str:
    digits = "0123456789abcdefghijklmnopqrstuvwxyz"
    text = ""
    while True:
        number, rest = divmod(number, 36)
        text = digits[rest] + text
        if not number:
            return text
