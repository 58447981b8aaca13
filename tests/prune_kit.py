"""Small torch networks and ONNX files that meet everything the analysis of channels has to know."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from edgesight.compression.cut import cut, masked
from edgesight.compression.groups import ChannelMap, find_groups
from edgesight.models.nets.common import DetectorNet
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

SIDE = 64
EXAMPLE = torch.zeros(1, 3, SIDE, SIDE)


class Folded(DetectorNet):
    """Three levels of a YOLOX head with two classes; no normalisation."""

    net_name, spec_head, strides, num_classes = "folded", "yolox", (8, 16, 32), 2

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 4, 1)
        self.act = nn.ReLU()
        self.down = nn.ModuleList(nn.Conv2d(width, width, 3, 2, 1) for _ in range(3))
        self.acts = nn.ModuleList(nn.ReLU() for _ in range(3))
        self.last = nn.ModuleList(nn.Conv2d(width, 7, 1) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.act(self.stem(x))
        levels = []
        for down, act, last in zip(self.down, self.acts, self.last, strict=True):
            x = act(down(x))
            levels.append(last(x))
        return levels


def folded(width: int = 16, seed: int = 0) -> Folded:
    torch.manual_seed(seed)
    return Folded(width).eval()


class Mixed(nn.Module):
    """Residual, concatenation, depthwise, grouped, chunk, squeeze-and-excite, shared, BN, PReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn, self.prelu = nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.PReLU(16)
        self.a, self.b = nn.Conv2d(16, 16, 3, 1, 1), nn.Conv2d(16, 16, 1)
        self.depthwise, self.point = nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.Conv2d(16, 24, 1)
        self.squeeze, self.excite = nn.Conv2d(24, 8, 1), nn.Conv2d(8, 24, 1)
        self.wide = nn.Conv2d(24, 32, 1)
        self.right = nn.Conv2d(16, 16, 1)
        self.grouped = nn.Conv2d(32, 16, 3, 1, 1, groups=4)
        self.before = nn.Conv2d(16, 12, 1)
        self.shared = nn.Conv2d(12, 12, 1)
        self.sigmoid = nn.Conv2d(12, 20, 1)
        self.last = nn.Conv2d(20 + 24, 7, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.prelu(self.bn(self.stem(x)))
        x = x + self.b(F.relu(self.a(x)))
        skip = x = F.silu(self.point(self.depthwise(x)))
        x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        left, right = torch.chunk(self.wide(x), 2, 1)
        x = torch.cat([left, F.relu(self.right(right))], dim=1)
        x = self.before(F.relu(self.grouped(x)))
        x = self.shared(F.relu(self.shared(F.relu(x))))
        x = torch.sigmoid(self.sigmoid(x))  # 0.5 where nothing comes in
        return [self.last(torch.cat(tensors=[x, F.interpolate(skip, size=x.shape[2:])], dim=1))]


class Untraceable(nn.Module):
    """Its course depends on a value in a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.conv(x) if x.mean() > 0 else self.conv(-x)]


class Picky(nn.Module):
    """YOLOX maps from a network that splits its channels; what ``enter_module`` is given."""

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 8, 1, bias=False), nn.BatchNorm2d(16))
        self.left, self.right = nn.Conv2d(8, 16, 1), nn.Conv2d(8, 16, 1)
        self.down = nn.ModuleList([nn.Conv2d(32, 32, 3, 2, 1), nn.Conv2d(32, 32, 3, 2, 1)])
        self.last = nn.ModuleList(nn.Conv2d(32, 5 + num_classes, 1) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        one, two = self.stem(x).chunk(2, 1)
        levels = [F.relu(torch.cat([self.left(one), self.right(two)], 1))]
        for down in self.down:
            levels.append(F.relu(down(levels[-1])))
        return [last(level) for last, level in zip(self.last, levels, strict=True)]


def picky(num_classes: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return Picky(num_classes)


def nothing() -> nn.Module:
    return nn.Identity()


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).detach().abs().max()) for x, y in zip(a, b, strict=True))


def proof(net: nn.Module, ratio: float, seed: int = 0, side: int = SIDE) -> tuple[float, float]:
    """Cuts random groups; largest difference to the masked network, and size of the outputs."""
    channels = find_groups(net, torch.zeros(1, 3, side, side))
    random = np.random.default_rng(seed)
    chosen = [n for n in range(len(channels.groups)) if random.random() < ratio]
    assert chosen
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        wanted = masked(net, channels, chosen)(x)
        return difference(cut(net, channels, chosen)(x), wanted), float(wanted[0].abs().max())


def conv_names(channels: ChannelMap) -> set[str]:
    """Convolutions of which some output channel may go."""
    return {name for group in channels.groups for name, _ in group.makers}


def write_onnx(path: Path) -> Path:
    """Writes a YOLOX detector for 64x64 pixels with a channel shuffle that fixes the batch.

    Classes, boxes and objectness come from three convolutions per level, the classes first. The
    shuffle is FastestDet's: it mixes batch and channels in one axis.
    """
    random = np.random.default_rng(0)
    tensors: list[onnx.TensorProto] = []
    nodes: list[onnx.NodeProto] = []

    def constant(name: str, value: object, kind: type = np.int64) -> str:
        tensors.append(numpy_helper.from_array(np.asarray(value, kind), name))
        return name

    def conv(x: str, name: str, cin: int, cout: int, kernel: int = 1, stride: int = 1) -> str:
        weight = random.normal(0, (cin * kernel**2) ** -0.5, (cout, cin, kernel, kernel))
        inputs = [x, constant(f"{name}.w", weight, np.float32)]
        inputs.append(constant(f"{name}.b", random.normal(0, 0.3, cout), np.float32))
        half = kernel // 2
        nodes.append(
            helper.make_node(
                "Conv", inputs, [name], name, strides=[stride] * 2, pads=[half] * 4,
                kernel_shape=[kernel] * 2,
            )
        )  # fmt: skip
        return name

    def op(kind: str, inputs: list[str], name: str, **attributes: object) -> str:
        nodes.append(helper.make_node(kind, inputs, [name], name, **attributes))
        return name

    x = op("Relu", [conv("images", "stem", 3, 16, 3, 8)], "stem_act")
    x = op("Reshape", [x, constant("flat", [8, 2, 64])], "shuffle_1")
    x = op("Transpose", [x], "shuffle_2", perm=[1, 0, 2])
    x = op("Reshape", [x, constant("apart", [2, 1, 8, 8, 8])], "shuffle_3")
    one = op("Gather", [x, constant("first", 0)], "one", axis=0)
    two = op("Gather", [x, constant("second", 1)], "two", axis=0)
    two = op("Relu", [conv(two, "branch", 8, 8)], "branch_act")
    x = op("Concat", [one, two], "joined", axis=1)
    flat, rows = [], 0
    for level, side in enumerate((8, 4, 2)):
        if level:
            x = op("Relu", [conv(x, f"down{level}", 16, 16, 3, 2)], f"down{level}_act")
        classes = op("Sigmoid", [conv(x, f"cls{level}", 16, 2)], f"cls{level}_s")
        boxes = conv(x, f"reg{level}", 16, 4)
        sure = op("Sigmoid", [conv(x, f"obj{level}", 16, 1)], f"obj{level}_s")
        level_out = op("Concat", [boxes, sure, classes], f"level{level}", axis=1)
        shape = constant(f"rows{level}", [1, 7, side * side])
        flat.append(op("Reshape", [level_out, shape], f"flat{level}"))
        rows += side * side
    op("Transpose", [op("Concat", flat, "all", axis=2)], "output", perm=[0, 2, 1])
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, rows, 7])],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path
