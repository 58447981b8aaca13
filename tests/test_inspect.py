"""The ``inspect`` command on a float file, an INT8 file, and files that are neither."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from edgesight.__main__ import main
from edgesight.compression.calibrate import Grid
from edgesight.compression.onnx_io import save_model, tidy
from edgesight.compression.qdq import insert, plan_layout

kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny_graphs.py"))))


@pytest.fixture
def float_file(tmp_path: Path) -> Path:
    path = tmp_path / "float.onnx"
    save_model(tidy(kit.detector("leaky")), path, kit.SPEC)
    return path


@pytest.fixture
def int8_file(tmp_path: Path) -> Path:
    model = tidy(kit.detector("leaky"))
    layout = plan_layout(model)
    grids = {name: Grid.over(-4, 4) for name in set(layout.group.values())}
    path = tmp_path / "int8.onnx"
    save_model(insert(model, layout, grids, signed=False), path, kit.SPEC)
    return path


def test_int8_file(int8_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(int8_file)]) == 0
    text = capsys.readouterr().out
    assert "INT8: 100.0 %" in text
    assert "9 QLinearConv" in text
    assert main(["inspect", str(int8_file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["conv_macs_integer_share"] == 1
    assert found["spec"]["name"] == "tiny graph"
    assert found["optimised_integer_ops"]["QLinearConv"] == 9
    assert found["int8_weights"]


def test_float_file_is_not_called_int8(
    float_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(float_file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"].startswith("this file is not INT8")
    assert found["macs"] > 0
    assert found["parameters"] > 1000
    assert not found["int8_weights"]


def test_quantized_weights_alone_are_not_int8(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tidy(kit.detector("leaky"))
    layout = plan_layout(model)
    grids = {name: Grid.over(-4, 4) for name in set(layout.group.values())}
    small = insert(model, layout, grids, signed=False)
    convs = {n.output[0] for n in small.graph.node if n.op_type == "Conv"}
    for node in small.graph.node:
        for index, name in enumerate(node.input):
            if name.endswith("/dq") and name.removesuffix("/dq") in convs:
                node.input[index] = name.removesuffix("/dq")
    path = tmp_path / "pretender.onnx"
    save_model(small, path, kit.SPEC)
    assert main(["inspect", str(path)]) == 0
    assert "this file is not INT8 here" in capsys.readouterr().out


def test_bad_files_end_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "none.onnx")]) == 2
    (tmp_path / "text.onnx").write_text("no model")
    assert main(["inspect", str(tmp_path / "text.onnx")]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["inspect", "--help"])
    assert ended.value.code == 0
    assert "edgesight inspect yolox_nano_int8.onnx" in capsys.readouterr().out
