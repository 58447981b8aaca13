"""YOLOX nano, tiny and s: CSP-Darknet backbone, PAFPN neck, decoupled anchor-free head.

Structure and submodule names follow the published network (Megvii's YOLOX, Apache-2.0), so its
checkpoints load by name; the code is our own. The input is BGR 0..255, not normalised.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import ConvNormAct, DetectorNet

BN_EPS = 1e-3
"""The published checkpoints were trained with this epsilon, not torch's 1e-5."""
BN_MOMENTUM = 0.03


@dataclass(frozen=True)
class YoloxSize:
    """How one size scales the network.

    Attributes:
        width: Channels relative to the large one (64 in the stem).
        depth: Bottlenecks per block relative to the large one (3).
        depthwise: Whether 3x3 convolutions are split into depthwise and pointwise.
    """

    width: float
    depth: float
    depthwise: bool


SIZES: dict[str, YoloxSize] = {
    "nano": YoloxSize(0.25, 0.33, True),
    "tiny": YoloxSize(0.375, 0.33, False),
    "s": YoloxSize(0.5, 0.33, False),
}


def _conv(cin: int, cout: int, kernel: int, stride: int, act: str, groups: int = 1) -> ConvNormAct:
    """Make a convolution block with the published normalisation settings."""
    return ConvNormAct(cin, cout, kernel, stride, groups, act, BN_EPS, BN_MOMENTUM)


class DepthwiseConv(nn.Module):
    """A depthwise block (``dconv``) and a pointwise one (``pconv``).

    Args:
        cin: Channels in.
        cout: Channels out.
        stride: Stride of the depthwise 3x3 convolution.
        act: Activation name.
    """

    def __init__(self, cin: int, cout: int, stride: int, act: str) -> None:
        super().__init__()
        self.dconv = _conv(cin, cin, 3, stride, act, groups=cin)
        self.pconv = _conv(cin, cout, 1, 1, act)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, cin, H, W] to [B, cout, H / stride, W / stride]."""
        out: Tensor = self.pconv(self.dconv(x))
        return out


def _conv3(cin: int, cout: int, stride: int, act: str, depthwise: bool) -> nn.Module:
    """Make a 3x3 block, whole or split."""
    if depthwise:
        return DepthwiseConv(cin, cout, stride, act)
    return _conv(cin, cout, 3, stride, act)


class Focus(nn.Module):
    """Space to depth by two, then a 3x3 block.

    Args:
        cin: Channels in.
        cout: Channels out.
        act: Activation name.
    """

    def __init__(self, cin: int, cout: int, act: str) -> None:
        super().__init__()
        self.conv = _conv(4 * cin, cout, 3, 1, act)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, cin, H, W] to [B, cout, H/2, W/2]; H and W even."""
        corners = [x[..., row::2, col::2] for col in (0, 1) for row in (0, 1)]
        out: Tensor = self.conv(torch.cat(corners, 1))
        return out


class Bottleneck(nn.Module):
    """1x1 and 3x3 block, with or without a shortcut around them.

    Args:
        channels: Channels in and out.
        shortcut: Whether the input is added to the output.
        depthwise: Whether the 3x3 block is split.
        act: Activation name.
    """

    def __init__(self, channels: int, shortcut: bool, depthwise: bool, act: str) -> None:
        super().__init__()
        self.conv1 = _conv(channels, channels, 1, 1, act)
        self.conv2 = _conv3(channels, channels, 1, act, depthwise)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, channels, H, W] to the same shape."""
        out: Tensor = self.conv2(self.conv1(x))
        return out + x if self.shortcut else out


class CSPLayer(nn.Module):
    """Cross-stage block: half of the channels go through bottlenecks, half beside them.

    Args:
        cin: Channels in.
        cout: Channels out.
        repeats: How many bottlenecks.
        shortcut: Whether the bottlenecks have shortcuts.
        depthwise: Whether their 3x3 blocks are split.
        act: Activation name.
    """

    def __init__(
        self, cin: int, cout: int, repeats: int, shortcut: bool, depthwise: bool, act: str
    ) -> None:
        super().__init__()
        half = cout // 2
        self.conv1 = _conv(cin, half, 1, 1, act)
        self.conv2 = _conv(cin, half, 1, 1, act)
        self.conv3 = _conv(2 * half, cout, 1, 1, act)
        self.m = nn.Sequential(
            *(Bottleneck(half, shortcut, depthwise, act) for _ in range(repeats))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, cin, H, W] to [B, cout, H, W]."""
        main, side = self.conv1(x), self.conv2(x)
        out: Tensor = self.conv3(torch.cat([self.m(main), side], 1))
        return out


class SPP(nn.Module):
    """Max pools of 5, 9 and 13 cells side by side between two 1x1 blocks.

    Args:
        cin: Channels in.
        cout: Channels out.
        act: Activation name.
    """

    def __init__(self, cin: int, cout: int, act: str) -> None:
        super().__init__()
        sides = (5, 9, 13)
        self.conv1 = _conv(cin, cin // 2, 1, 1, act)
        self.m = nn.ModuleList(nn.MaxPool2d(side, 1, side // 2) for side in sides)
        self.conv2 = _conv(cin // 2 * (len(sides) + 1), cout, 1, 1, act)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, cin, H, W] to [B, cout, H, W]."""
        x = self.conv1(x)
        out: Tensor = self.conv2(torch.cat([x, *(pool(x) for pool in self.m)], 1))
        return out


class CSPDarknet(nn.Module):
    """The backbone.

    Args:
        size: Width, depth and kind of convolution.
        act: Activation name.
    """

    def __init__(self, size: YoloxSize, act: str) -> None:
        super().__init__()
        c = int(size.width * 64)
        n = max(round(size.depth * 3), 1)
        split = size.depthwise
        self.stem = Focus(3, c, act)
        self.dark2 = nn.Sequential(
            _conv3(c, 2 * c, 2, act, split), CSPLayer(2 * c, 2 * c, n, True, split, act)
        )
        self.dark3 = nn.Sequential(
            _conv3(2 * c, 4 * c, 2, act, split), CSPLayer(4 * c, 4 * c, 3 * n, True, split, act)
        )
        self.dark4 = nn.Sequential(
            _conv3(4 * c, 8 * c, 2, act, split), CSPLayer(8 * c, 8 * c, 3 * n, True, split, act)
        )
        self.dark5 = nn.Sequential(
            _conv3(8 * c, 16 * c, 2, act, split),
            SPP(16 * c, 16 * c, act),
            CSPLayer(16 * c, 16 * c, n, False, split, act),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map [B, 3, H, W] to features at strides 8, 16 and 32."""
        x3 = self.dark3(self.dark2(self.stem(x)))
        x4 = self.dark4(x3)
        return x3, x4, self.dark5(x4)


class PAFPN(nn.Module):
    """The backbone and the path-aggregation neck on top of it.

    Args:
        size: Width, depth and kind of convolution.
        act: Activation name.
    """

    def __init__(self, size: YoloxSize, act: str) -> None:
        super().__init__()
        c3, c4, c5 = (int(size.width * channels) for channels in (256, 512, 1024))
        n = round(size.depth * 3)
        split = size.depthwise
        self.backbone = CSPDarknet(size, act)
        self.lateral_conv0 = _conv(c5, c4, 1, 1, act)
        self.C3_p4 = CSPLayer(2 * c4, c4, n, False, split, act)
        self.reduce_conv1 = _conv(c4, c3, 1, 1, act)
        self.C3_p3 = CSPLayer(2 * c3, c3, n, False, split, act)
        self.bu_conv2 = _conv3(c3, c3, 2, act, split)
        self.C3_n3 = CSPLayer(2 * c3, c4, n, False, split, act)
        self.bu_conv1 = _conv3(c4, c4, 2, act, split)
        self.C3_n4 = CSPLayer(2 * c4, c5, n, False, split, act)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map [B, 3, H, W] to fused features at strides 8, 16 and 32."""
        x3, x4, x5 = self.backbone(x)
        top = self.lateral_conv0(x5)
        mid = self.reduce_conv1(self.C3_p4(torch.cat([_double(top), x4], 1)))
        out8 = self.C3_p3(torch.cat([_double(mid), x3], 1))
        out16 = self.C3_n3(torch.cat([self.bu_conv2(out8), mid], 1))
        out32 = self.C3_n4(torch.cat([self.bu_conv1(out16), top], 1))
        return out8, out16, out32


def _double(x: Tensor) -> Tensor:
    """Upsample [B, C, H, W] to [B, C, 2H, 2W] by repeating cells."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class YOLOXHead(nn.Module):
    """A stem, two branches of two 3x3 blocks and three predictions for each level.

    Args:
        num_classes: Classes to tell apart.
        size: Width and kind of convolution.
        act: Activation name.
    """

    def __init__(self, num_classes: int, size: YoloxSize, act: str) -> None:
        super().__init__()
        inputs = [int(size.width * channels) for channels in (256, 512, 1024)]
        c = int(size.width * 256)

        def branch() -> nn.Module:
            return nn.Sequential(*(_conv3(c, c, 1, act, size.depthwise) for _ in range(2)))

        self.stems = nn.ModuleList(_conv(cin, c, 1, 1, act) for cin in inputs)
        self.cls_convs = nn.ModuleList(branch() for _ in inputs)
        self.reg_convs = nn.ModuleList(branch() for _ in inputs)
        self.cls_preds = nn.ModuleList(nn.Conv2d(c, num_classes, 1) for _ in inputs)
        self.reg_preds = nn.ModuleList(nn.Conv2d(c, 4, 1) for _ in inputs)
        self.obj_preds = nn.ModuleList(nn.Conv2d(c, 1, 1) for _ in inputs)

    def forward(self, levels: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Map each level's features to (box [B, 4, H_l, W_l], objectness 1, classes) logits."""
        maps = []
        for i, x in enumerate(levels):
            x = self.stems[i](x)
            classes = self.cls_preds[i](self.cls_convs[i](x))
            x = self.reg_convs[i](x)
            maps.append((self.reg_preds[i](x), self.obj_preds[i](x), classes))
        return maps


class YOLOX(DetectorNet):
    """YOLOX in one of its small sizes.

    Args:
        size: A key of :data:`SIZES`.
        num_classes: Classes to tell apart.
        activation: A key of :data:`~edgesight.models.nets.common.ACTIVATIONS`.
    """

    spec_head = "yolox"
    strides = (8, 16, 32)

    def __init__(self, size: str, num_classes: int = 80, activation: str = "silu") -> None:
        super().__init__()
        if size not in SIZES:
            message = f"expected a size out of {sorted(SIZES)}, found {size!r}"
            raise ValueError(message)
        self.net_name = f"yolox_{size}"
        self.num_classes = num_classes
        self.backbone = PAFPN(SIZES[size], activation)
        self.head = YOLOXHead(num_classes, SIZES[size], activation)
        self._init_weights()

    def _init_weights(self) -> None:
        """Start objectness and class scores at 0.01."""
        for last in (*self.head.obj_preds, *self.head.cls_preds):
            if isinstance(last, nn.Conv2d) and last.bias is not None:
                nn.init.constant_(last.bias, -math.log(0.99 / 0.01))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map [B, 3, H, W] to three maps [B, 4 + 1 + classes, H_l, W_l] of logits.

        H and W are multiples of 32. Channels: xy offset in cells, log of wh in cells, objectness,
        classes.
        """
        return [torch.cat(parts, 1) for parts in self.head(self.backbone(x))]

    def tail(self, levels: list[Tensor]) -> Tensor:
        """Return [B, N, 4 + 1 + classes]: raw boxes, then objectness and classes after sigmoid.

        N counts the cells of all levels, finest level first, row by row.
        """
        parts = [(m[:, :4], m[:, 4:5], m[:, 5:]) for m in levels]
        return _join(parts)

    def export_forward(self, x: Tensor) -> Tensor:
        """Return the same as ``tail(forward(x))`` without concatenating logits on the way.

        So the exported graph never has box and score logits in one tensor, as in the published
        file: one quantization scale over both would destroy the scores.
        """
        return _join(self.head(self.backbone(x)))


def _join(levels: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Turn (box, objectness, classes) logits per level into [B, N, 4 + 1 + classes]."""
    flat = [
        torch.cat([box, objectness.sigmoid(), classes.sigmoid()], 1).flatten(2)
        for box, objectness, classes in levels
    ]
    return torch.cat(flat, 2).permute(0, 2, 1)
