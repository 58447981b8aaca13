"""Published ONNX detectors: they come in, compute the same, can be cut, and go out again."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from edgesight.compression.calibrate import session
from edgesight.compression.cut import cut, masked
from edgesight.compression.enter import enter_onnx
from edgesight.compression.foreign import export_foreign
from edgesight.compression.groups import find_groups
from edgesight.models.dataset import load_image
from edgesight.models.errors import ModelFileError
from edgesight.models.preprocess import fit, normalise

pytestmark = pytest.mark.shared
kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("prune_kit.py"))))


@pytest.mark.parametrize(
    ("file", "head", "groups"),
    [
        ("yolox_nano_416.onnx", "yolox", 5400),
        ("nanodet_plus_m_416.onnx", "nanodet_plus", 6300),
        ("nanodet_m_416.onnx", "nanodet", 5200),
    ],
)
def test_in_and_out_again(file: str, head: str, groups: int, shared: Path) -> None:
    path = shared / "weights" / file
    net, spec = enter_onnx(path)
    assert net.spec_head == head
    assert net.layout.logits != slice(0, 0)
    photo = load_image(sorted((shared / "data/coco-val/images").glob("*.jpg"))[200])
    x = normalise(fit(photo, spec)[0], spec)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    original = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    wanted = original.run(None, {original.get_inputs()[0].name: x})
    model = export_foreign(net, spec)
    runner = session(model)
    found = runner.run(None, {runner.get_inputs()[0].name: x})
    names = [o.name for o in original.get_outputs()]
    assert [o.name for o in runner.get_outputs()] == names
    gap = max(float(np.abs(a - b).max()) for a, b in zip(wanted, found, strict=True))
    with torch.no_grad():
        out = net.export_forward(torch.from_numpy(x))
    parts = out if isinstance(out, tuple) else (out,)
    torch_gap = max(float(np.abs(a - b.numpy()).max()) for a, b in zip(wanted, parts, strict=True))
    print(f"{file}: exported again {gap:.1e}, in torch {torch_gap:.1e}")
    assert gap < 2e-4
    assert torch_gap < 1e-3

    channels = find_groups(net, torch.zeros(1, 3, *spec.input_hw))
    assert len(channels.groups) > groups
    assert set(channels.frozen) <= {"the picture", "the network's output"}
    chosen = list(range(0, len(channels.groups), 3))
    noise = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        gap = kit.difference(
            cut(net, channels, chosen)(noise), masked(net, channels, chosen)(noise)
        )
    assert gap < 1e-4


def test_an_unknown_head_is_one_clear_line(shared: Path) -> None:
    with pytest.raises(ModelFileError, match="name its head") as caught:
        enter_onnx(shared / "weights/fastestdet_352.onnx")
    assert "\n" not in str(caught.value)
