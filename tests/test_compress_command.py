"""``edgesight compress`` as people and scripts call it."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from edgesight.__main__ import main
from edgesight.compression import command as command_module
from edgesight.compression import source as source_module
from edgesight.compression.export import export_detector
from edgesight.compression.state import describe
from edgesight.models.detector import OnnxDetector
from edgesight.models.nets import build
from edgesight.models.nets.common import fold_batchnorm
from edgesight.models.spec import ModelSpec

HERE = Path(__file__).parent
tools: Any = runpy.run_path(str(HERE / "tiny_recipe.py"))
tiny: Any = runpy.run_path(str(HERE / "tiny_net.py"))


@pytest.fixture(autouse=True)
def tiny_net(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets recipes find ``tiny_net``."""
    module = ModuleType("tiny_net")
    vars(module).update(tiny)
    monkeypatch.setitem(sys.modules, "tiny_net", module)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with photos."""
    monkeypatch.chdir(tmp_path)
    tools["draw_photos"](tmp_path / "photos")
    return tmp_path


def write_recipe(folder: Path, values: dict[str, Any]) -> str:
    (folder / "r.toml").write_text(tools["as_toml"](values))
    return "r.toml"


def float_file(folder: Path) -> Path:
    torch.manual_seed(0)
    net = tiny["make"]()
    fold_batchnorm(net)
    spec = ModelSpec("yolox", (64, 64), ("a", "b", "c"), name="tiny")
    export_detector(net.eval(), spec, folder / "tiny.onnx", (), describe("tiny", 3, []))
    return folder / "tiny.onnx"


def test_a_recipe_from_end_to_end(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_recipe(folder, tools["tiny_recipe"](out="elsewhere"))
    assert main(["compress", file, "--json", "--quiet", "--out", "mine"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    found = json.loads(lines[0])
    assert [row["title"] for row in found["steps"]] == [
        "original", "1 prune", "2 distill", "3 quantize", "4 verify",
    ]  # fmt: skip
    assert found["steps"][1]["macs"] <= 0.6 * found["steps"][0]["macs"]
    assert found["verify"]["size"]["ratio"] < 0.5
    out = folder / "mine"
    assert OnnxDetector(out / "model.onnx").spec.name == "tiny"
    assert json.loads((out / "report.json").read_text())["verify"] == found["verify"]
    assert "data:image/jpeg" in (out / "report.html").read_text()
    assert not (folder / "elsewhere").exists()
    assert str(folder) not in (out / "report.json").read_text()


def test_quantize_only(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = float_file(folder)
    before = model.read_bytes()
    assert main(["compress", "--quantize-only", str(model), "--photos", "photos", "--quiet"]) == 0
    text = capsys.readouterr().out
    assert "agreement with the original" in text
    out = folder / "tiny_int8.onnx"
    assert f"written: {out}" in text
    assert out.stat().st_size < len(before)
    assert model.read_bytes() == before
    assert OnnxDetector(out).spec == OnnxDetector(model).spec
    arguments = ["compress", "--quantize-only", str(out), "--photos", "photos", "--out", "x.onnx"]
    assert main(arguments) == 2
    assert "expected a float model" in capsys.readouterr().err
    assert not (folder / "x.onnx").exists()


def test_the_demonstration(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(build.NETS, "tiny", tiny["TinyNet"])
    model = float_file(folder)
    monkeypatch.setattr(source_module, "shipped_float", lambda: model)
    steps = [dict(step) for step in command_module.DEMO_STEPS]
    steps[1] |= {"photos": 8}
    monkeypatch.setattr(command_module, "DEMO_STEPS", steps)
    assert main(["compress", "--quiet"]) == 0
    assert "runs/demo/model.onnx" in capsys.readouterr().out
    assert (folder / "runs/demo/report.html").is_file()
    assert OnnxDetector(folder / "runs/demo/model.onnx").spec.classes == ("a", "b", "c")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.toml"], "none.toml: expected a recipe"),
        (["--photos", "photos"], "expected --photos with --quantize-only"),
        (["r.toml", "--target", "x86-64"], "expected --target with --quantize-only"),
        (["r.toml", "--refine", "0"], "expected --refine with --quantize-only"),
        (["--quantize-only", "m.onnx"], "expected --photos DIR"),
        (["--quantize-only", "m.onnx", "--cost-max", "2"], "--cost-max: expected above 0"),
        (["--quantize-only", "m.onnx", "--bytes-max", "1MB"], "--bytes-max without --quantize"),
        (["--quantize-only", "m.onnx", "--photos", "photos"], "m.onnx: expected an ONNX model"),
        (["r.toml", "--quantize-only", "m.onnx", "--photos", "photos"], "found both"),
        (["--quantize-only", "bad.onnx", "--photos", "photos"], "bad.onnx: expected an ONNX"),
        (["--quantize-only", "bad.onnx", "--photos", "empty"], "empty: expected photos"),
        (["--quantize-only", "bad.onnx", "--photos", "nowhere"], "nowhere: expected a folder"),
        (["r.toml", "--out", "bad.onnx"], "expected a folder for the results, found a file"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str], words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_recipe(folder, tools["tiny_recipe"]([tools["PRUNE"]]))
    (folder / "bad.onnx").write_bytes(b"\x08\x07 not a model")
    (folder / "empty").mkdir()
    before = sorted(folder.rglob("*"))
    assert main(["compress", *arguments]) == 2
    errors = capsys.readouterr().err
    assert words in errors
    assert errors.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


def test_a_recipes_model_that_is_wrong(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model, words in (
        ({"module": "nowhere:make"}, "nowhere"),
        ({"module": "tiny_net:nothing"}, "tiny_net:nothing"),
        ({"name": "yolox_giga", "weights": "w.onnx"}, "w.onnx: expected an ONNX model"),
        ({"file": "bad.onnx"}, "bad.onnx: expected an ONNX model"),
    ):
        file = write_recipe(folder, tools["tiny_recipe"]([tools["PRUNE"]], model=model))
        (folder / "bad.onnx").write_bytes(b"no")
        assert main(["compress", file, "--quiet"]) == 2
        errors = capsys.readouterr().err
        assert words in errors
        assert "Traceback" not in errors


@pytest.mark.skipif(os.name != "posix", reason="needs a file size limit")
def test_a_full_disk(folder: Path) -> None:
    file = write_recipe(folder, tools["tiny_recipe"]([tools["PRUNE"]]))
    (folder / "edgesight").symlink_to(HERE.parent)
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "from edgesight.__main__ import main\n"
        f"sys.exit(main(['compress', {file!r}, '--quiet']))\n"
    )
    env = os.environ | {
        "PYTHONPATH": f"{folder}{os.pathsep}{HERE}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=200
    )
    assert done.returncode == 2, done.stderr
    assert "free space or choose another place" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "out" / "model.onnx").exists()


def test_missing_extras(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_recipe(folder, tools["tiny_recipe"]())
    for name in ("pydantic", "torch", "jinja2"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            assert main(["compress", file]) == 2
            errors = capsys.readouterr().err
            assert name in errors
            assert "pip install '.[compress]'" in errors


def test_help_needs_no_extras(tmp_path: Path) -> None:
    (tmp_path / "edgesight").symlink_to(HERE.parent)
    code = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'pydantic', 'jinja2', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        "from edgesight.__main__ import main\nmain(['compress', '--help'])\n"
    )
    env = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "edgesight compress recipe.toml" in done.stdout
    assert "--quantize-only" in done.stdout


def test_interrupted_it_says_how_to_go_on(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(args: Any) -> Any:
        raise KeyboardInterrupt

    file = write_recipe(folder, tools["tiny_recipe"]())
    monkeypatch.setattr(command_module, "_recipe", stop)
    assert main(["compress", file, "--out", "x"]) == 130
    assert "go on with: edgesight compress r.toml --out x" in capsys.readouterr().err
