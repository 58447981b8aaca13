"""What the tests of the networks share; loaded with runpy."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import warnings
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from edgesight.models.nets.build import build_net
from edgesight.models.nets.common import (
    DetectorNet,
    WithTail,
)
from torch import Tensor, nn

FX_NETS = ["yolox_nano", "yolox_tiny", "nanodet_plus_m"]
SIDE = 128


def lively(name: str, seed: int = 0, num_classes: int = 80) -> DetectorNet:
    """A random network in eval mode whose every layer changes its output visibly."""
    return copy.deepcopy(_lively(name, seed, num_classes))


@functools.cache
def _lively(name: str, seed: int, num_classes: int) -> DetectorNet:
    torch.manual_seed(seed)
    net = build_net(name, num_classes)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.momentum = 1.0
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    side = 320 if name == "ssdlite320" else SIDE
    with torch.no_grad():
        net.train()(torch.randn(2, 3, side, side))
    return net.eval()


def outputs(net: DetectorNet, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        out = net.export_forward(x)
    return list(out) if isinstance(out, tuple) else [out]


def image(seed: int = 1, side: int = SIDE, batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


def assert_same(a: DetectorNet, b: DetectorNet, atol: float = 0.0, side: int = SIDE) -> None:
    for first, second in zip(
        outputs(a, image(side=side)), outputs(b, image(side=side)), strict=True
    ):
        torch.testing.assert_close(first, second, atol=atol, rtol=0)


def export(net: DetectorNet, path: Path, side: int = SIDE, dynamo: bool = False) -> Path:
    quiet = contextlib.ExitStack()
    with quiet:
        quiet.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        torch.onnx.export(
            WithTail(net),
            (image(side=side),),
            str(path),
            dynamo=dynamo,
            opset_version=18,
            input_names=["images"],
            **({"external_data": False, "verbose": False} if dynamo else {}),
        )
    return path


def run_onnx(path: Path, x: Tensor) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": x.numpy()})


# -- shapes and sizes
