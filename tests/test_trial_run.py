"""A model is run in a process of its own first, and what is no model is refused there."""

from __future__ import annotations

import runpy
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from edgesight.models.errors import ModelFileError
from edgesight.models.external_data import has_external_data
from edgesight.models.trial_run import trial_run
from onnx import TensorProto, helper

kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("app_kit.py"))))
models: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("models_kit.py"))))
endless = models.endless
GUARD_S = 60


def test_file_that_hangs_or_crashes_does_so_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"found one that hangs \(3 s\)"):
        trial_run(endless(tmp_path / "endless.onnx"), time_max_s=3)
    trial_run(kit.build_tiny(tmp_path / "good.onnx"))
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(ModelFileError, match="expected an ONNX model, found 8 bytes"):
        trial_run(tmp_path / "bad.onnx")


def test_file_that_kills_its_process_is_told_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a processor without an instruction does to the runtime, done to it at its import.
    broken = tmp_path / "path"
    (broken / "onnxruntime").mkdir(parents=True)
    (broken / "onnxruntime" / "__init__.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n"
    )
    monkeypatch.syspath_prepend(str(broken))
    with pytest.raises(ModelFileError, match=r"found one that ends its process \(SIGILL\)"):
        trial_run(kit.build_tiny(tmp_path / "good.onnx"))


def test_end_of_the_run_does_not_wait_for_a_trial(tmp_path: Path) -> None:
    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()
    with pytest.raises(ModelFileError, match="hangs"):
        trial_run(endless(tmp_path / "endless.onnx"), time_max_s=GUARD_S * 10, stop=stop)


def test_file_that_names_other_files_is_refused(tmp_path: Path) -> None:
    model = onnx.load(kit.build_tiny(tmp_path / "a.onnx"))
    onnx.save(model, tmp_path / "b.onnx", save_as_external_data=True, size_threshold=0)
    with pytest.raises(ModelFileError, match="expected a model in one file"):
        trial_run(tmp_path / "b.onnx")
    assert not has_external_data((tmp_path / "a.onnx").read_bytes())
    # Hidden in the body of a loop, in a constant, and behind a part that older readers skip:
    hidden = onnx.load(endless(tmp_path / "c.onnx"))
    tensor = onnx.numpy_helper.from_array(np.zeros(3, np.float32), "w")
    tensor.data_location = TensorProto.EXTERNAL
    body = next(n for n in hidden.graph.node if n.op_type == "Loop").attribute[0].g
    body.node.append(helper.make_node("Constant", [], ["w"], value=tensor))
    assert has_external_data(hidden.SerializeToString())
    with pytest.raises(ValueError, match="a part of kind 3"):
        has_external_data(b"\x0b\x0c" + hidden.SerializeToString())
