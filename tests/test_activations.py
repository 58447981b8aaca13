"""ReLU in place of dearer activations: swapped, refitted, remembered, gone from the files."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from edgesight.compression.activations import NEW, activations_of, replace_activations
from edgesight.compression.compensate import refit
from edgesight.compression.photos import calibration_batches
from edgesight.compression.pipeline import run_recipe
from edgesight.compression.recipe import make_recipe
from edgesight.compression.settings import ActivationsStep
from edgesight.models.detector import OnnxDetector
from edgesight.models.graph import load_model
from edgesight.models.nets.build import build_net, load_weights
from edgesight.models.nets.common import fold_batchnorm
from torch import nn

HERE = Path(__file__).parent
kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny_recipe.py"))))
tiny: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny_net.py"))))


@pytest.fixture(autouse=True)
def tiny_net(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets recipes find ``tiny_net``."""
    module = ModuleType("tiny_net")
    vars(module).update(vars(tiny))
    monkeypatch.setitem(sys.modules, "tiny_net", module)


def operators(path: Path) -> set[str]:
    return {node.op_type for node in load_model(path).graph.node}


@pytest.mark.parametrize(
    ("name", "kind"),
    [("yolox_nano", "silu"), ("nanodet_plus_m", "leaky_relu"), ("ssdlite320", "hard_swish")],
)
def test_finds_and_replaces_the_activations_of_real_networks(name: str, kind: str) -> None:
    net = build_net(name, 4).eval()
    found = activations_of(net)
    assert kind in found.values()
    relus = sum(isinstance(m, nn.ReLU) for m in net.modules())
    changed = replace_activations(net, found, "relu")
    assert not activations_of(changed)
    assert sum(isinstance(m, nn.ReLU) for m in changed.modules()) == relus + len(found)
    assert activations_of(net) == found, "the network that was given stays as it is"
    assert not changed.training


def test_some_can_be_kept() -> None:
    net = tiny.make()
    some = [name for name in activations_of(net) if "down" in name]
    assert activations_of(replace_activations(net, some, "relu6")) == {"stem.act": "leaky_relu"}


def test_a_recipe_can_ask_for_every_new_activation_and_no_other() -> None:
    assert set(get_args(ActivationsStep.model_fields["to"].annotation)) == set(NEW)


def test_refitting_makes_up_for_the_swap() -> None:
    torch.manual_seed(0)
    net = tiny.make()
    fold_batchnorm(net)
    batches = [60 * torch.randn(4, 3, 64, 64) for _ in range(8)]
    swapped = replace_activations(net, activations_of(net), "relu")
    fresh = 60 * torch.randn(4, 3, 64, 64)

    def distance(other: nn.Module) -> float:
        with torch.no_grad():
            pairs = zip(net(fresh), other(fresh), strict=True)
        return sum(float((a - b).square().mean()) for a, b in pairs)

    blunt = distance(swapped)
    refit(swapped, net, {}, batches, progress=False)
    assert distance(swapped) < 0.8 * blunt


def recipe(folder: Path, steps: list[dict[str, Any]], **changes: Any) -> Any:
    kit.draw_photos(folder / "photos")
    return make_recipe(kit.tiny_recipe(steps, **changes), folder)


def test_a_recipe_swaps_prunes_and_quantizes_without_the_old_activation(
    tmp_path: Path, one_thread: None
) -> None:
    step = {"kind": "activations", "photos": 8}
    steps = [step, {**kit.PRUNE, "macs_ratio": 0.7}, {"kind": "quantize", "photos": 6}]
    result = run_recipe(recipe(tmp_path, steps), progress=False, say=lambda line: None)
    report = result.rows[1].report
    assert report is not None
    assert report.figures["replaced"] == {"leaky_relu": 4}
    assert "LeakyRelu" in operators(tmp_path / "out" / "original.onnx")
    assert "LeakyRelu" not in operators(result.float_file)
    assert "LeakyRelu" not in operators(result.final)
    kinds = [edit["kind"] for edit in result.state.edits]
    assert kinds == ["activations", "cut"]
    again = run_recipe(recipe(tmp_path, steps), progress=False, say=lambda line: None)
    assert all(row.resumed for row in again.rows[1:])
    for name, value in result.state.net.state_dict().items():
        np.testing.assert_array_equal(again.state.net.state_dict()[name], value)


def test_nothing_to_replace_is_said(tmp_path: Path, one_thread: None) -> None:
    step = {"kind": "activations", "keep": [""]}
    result = run_recipe(recipe(tmp_path, [step]), progress=False, say=lambda line: None)
    report = result.rows[1].report
    assert report is not None
    assert report.notes == ("nothing to replace: no activation that relu is cheaper than",)
    assert report.figures["kept"] == 4


def test_the_shipped_detector_comes_in_again_after_the_swap(
    tmp_path: Path, one_thread: None
) -> None:
    values = {
        "version": 1,
        "out": "out",
        "model": "shipped",
        "data": {
            "photos": str(HERE.parent / "device_app" / "samples"),
            "hold_out": 2,
            "step_photos": 0,
        },
        "steps": [{"kind": "activations", "photos": 2}],
    }
    result = run_recipe(make_recipe(values, tmp_path), progress=False, say=lambda line: None)
    assert "LeakyRelu" not in operators(result.final)
    file = {"file": str(result.final)}
    values |= {"model": file, "out": "again", "steps": [{"kind": "activations", "photos": 2}]}
    again = run_recipe(make_recipe(values, tmp_path), progress=False, say=lambda line: None)
    report = again.rows[1].report
    assert report is not None
    assert report.figures["replaced"] == {}, "the file says that it has no such activation left"


@pytest.mark.shared
def test_refitting_saves_a_real_detector(shared: Path, one_thread: None) -> None:
    """NanoDet-Plus-m sees nothing any more after a blunt swap, and nearly all after a refit."""
    net = build_net("nanodet_plus_m")
    load_weights(net, shared / "weights" / "nanodet_plus_m_416.onnx")
    net.eval()
    spec = OnnxDetector(shared / "weights" / "nanodet_plus_m_416.onnx").spec
    spec = spec.with_changes(input_hw=(224, 224))
    paths = sorted((shared / "data" / "unlabelled").rglob("*.jpg"))[:72]
    batches = calibration_batches(paths, spec, len(paths))
    swapped = replace_activations(net, activations_of(net), "relu")

    def sure(other: nn.Module) -> float:
        """How much of what the original is sure of, the other is sure of too."""
        with torch.no_grad():
            pairs = [(net(x)[0], other(x)[0]) for x in batches[-2:]]
        wanted = torch.cat([a[:, :80].sigmoid().flatten() for a, _ in pairs])
        got = torch.cat([b[:, :80].sigmoid().flatten() for _, b in pairs])
        return float((got[wanted > 0.4] > 0.25).float().mean())

    assert sure(swapped) < 0.2
    refit(swapped, net, {}, batches[:-2], ridge=0.1, progress=False)
    assert sure(swapped) > 0.6
