"""NanoDet-Plus-m: ShuffleNetV2 1.0x backbone, GhostPAN neck, one light head per level.

Structure and submodule names follow the published network (RangiLyu's NanoDet, Apache-2.0), so
its checkpoints load by name; the code is our own. What differs is the channel shuffle: here it is
no reshape and transpose but part of explicit index lists. A block's two gathers
(``pass_index``, ``branch_index``) read their channels straight from the *unshuffled* output of
the block before, and one gather at the end of a stage (``out_index``) gives the order that the
rest of the network expects. Cutting channels is then only editing index lists.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import ConvNormAct, DetectorNet, make_activation

STAGE_CHANNELS = (24, 116, 232, 464)
STAGE_BLOCKS = (4, 8, 4)


def shuffle_index(channels: int) -> Tensor:
    """Return the order in which a two-group channel shuffle reads its input.

    Args:
        channels: How many channels, even.

    Returns:
        int64 [channels]: shuffled channel ``j`` is input channel ``index[j]``.
    """
    return torch.arange(channels).reshape(2, channels // 2).t().flatten()


def _conv_bn(cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Convolution ('same' padding, no bias) and its normalisation, to go into a Sequential."""
    conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(cout)]


class DownBlock(nn.Module):
    """First block of a stage: both branches see the whole input at stride 2.

    Args:
        cin: Channels in.
        cout: Channels out, half from each branch.
        act: Activation name.
    """

    def __init__(self, cin: int, cout: int, act: str) -> None:
        super().__init__()
        half = cout // 2
        self.branch1 = nn.Sequential(
            *_conv_bn(cin, cin, 3, 2, cin), *_conv_bn(cin, half, 1), make_activation(act)
        )
        self.branch2 = nn.Sequential(
            *_conv_bn(cin, half, 1),
            make_activation(act),
            *_conv_bn(half, half, 3, 2, half),
            *_conv_bn(half, half, 1),
            make_activation(act),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, cin, H, W] to [B, cout, H/2, W/2], not shuffled."""
        return torch.cat([self.branch1(x), self.branch2(x)], 1)


class UnitBlock(nn.Module):
    """Later block of a stage: some channels pass, the others go through a branch.

    Args:
        channels: Channels in and out.
        act: Activation name.
    """

    pass_index: Tensor
    branch_index: Tensor

    def __init__(self, channels: int, act: str) -> None:
        super().__init__()
        half = channels // 2
        order = shuffle_index(channels)
        self.register_buffer("pass_index", order[:half].clone())
        self.register_buffer("branch_index", order[half:].clone())
        self.branch2 = nn.Sequential(
            *_conv_bn(half, half, 1),
            make_activation(act),
            *_conv_bn(half, half, 3, 1, half),
            *_conv_bn(half, half, 1),
            make_activation(act),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, channels, H, W], the unshuffled output of the block before, to the same shape."""
        passed = x.index_select(1, self.pass_index)
        branched = self.branch2(x.index_select(1, self.branch_index))
        return torch.cat([passed, branched], 1)


class ShuffleStage(nn.Sequential):
    """A stage of blocks and the gather that puts its channels into the published order.

    Args:
        cin: Channels in.
        cout: Channels out.
        blocks: How many blocks, the first of them at stride 2.
        act: Activation name.
    """

    out_index: Tensor

    def __init__(self, cin: int, cout: int, blocks: int, act: str) -> None:
        super().__init__(
            DownBlock(cin, cout, act), *(UnitBlock(cout, act) for _ in range(blocks - 1))
        )
        self.register_buffer("out_index", shuffle_index(cout))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, cin, H, W] to [B, cout, H/2, W/2]."""
        for block in self:
            x = block(x)
        return x.index_select(1, self.out_index)


class ShuffleNetV2(nn.Module):
    """ShuffleNetV2 1.0x without its classifier.

    Args:
        act: Activation name.
    """

    def __init__(self, act: str) -> None:
        super().__init__()
        c1, c2, c3, c4 = STAGE_CHANNELS
        n2, n3, n4 = STAGE_BLOCKS
        self.conv1 = nn.Sequential(*_conv_bn(3, c1, 3, 2), make_activation(act))
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.stage2 = ShuffleStage(c1, c2, n2, act)
        self.stage3 = ShuffleStage(c2, c3, n3, act)
        self.stage4 = ShuffleStage(c3, c4, n4, act)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map [B, 3, H, W] to features at strides 8, 16 and 32 (116, 232, 464 channels)."""
        x2 = self.stage2(self.maxpool(self.conv1(x)))
        x3 = self.stage3(x2)
        return x2, x3, self.stage4(x3)


class DepthwiseSeparable(nn.Module):
    """Depthwise and pointwise convolution, each with normalisation and activation.

    Args:
        channels: Channels in and out.
        kernel: Side of the depthwise kernel.
        stride: Stride of the depthwise convolution.
        act: Activation name.
    """

    def __init__(self, channels: int, kernel: int, stride: int, act: str) -> None:
        super().__init__()
        self.depthwise, self.dwnorm = _conv_bn(channels, channels, kernel, stride, channels)
        self.dwact = make_activation(act)
        self.pointwise, self.pwnorm = _conv_bn(channels, channels, 1)
        self.pwact = make_activation(act)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, channels, H, W] to [B, channels, H / stride, W / stride] (rounded up)."""
        x = self.dwact(self.dwnorm(self.depthwise(x)))
        out: Tensor = self.pwact(self.pwnorm(self.pointwise(x)))
        return out


class GhostModule(nn.Module):
    """Half of the channels by a 1x1 convolution, the other half cheaply from those.

    Args:
        cin: Channels in.
        cout: Channels out, even.
        act: Activation name (``none`` for a linear one).
    """

    def __init__(self, cin: int, cout: int, act: str) -> None:
        super().__init__()
        half = cout // 2
        self.primary_conv = nn.Sequential(*_conv_bn(cin, half, 1), make_activation(act))
        self.cheap_operation = nn.Sequential(
            *_conv_bn(half, half, 3, 1, half), make_activation(act)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, cin, H, W] to [B, cout, H, W]."""
        primary = self.primary_conv(x)
        return torch.cat([primary, self.cheap_operation(primary)], 1)


class GhostBottleneck(nn.Module):
    """Two ghost modules beside a depthwise-separable shortcut.

    Args:
        cin: Channels in.
        cout: Channels out.
        kernel: Side of the shortcut's depthwise kernel.
        act: Activation name.
    """

    def __init__(self, cin: int, cout: int, kernel: int, act: str) -> None:
        super().__init__()
        self.ghost1 = GhostModule(cin, cout, act)
        self.ghost2 = GhostModule(cout, cout, "none")
        self.shortcut = nn.Sequential(*_conv_bn(cin, cin, kernel, 1, cin), *_conv_bn(cin, cout, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, cin, H, W] to [B, cout, H, W]."""
        main, side = self.ghost2(self.ghost1(x)), self.shortcut(x)
        out: Tensor = main + side
        return out


class GhostBlocks(nn.Module):
    """One ghost bottleneck under the name that published checkpoints use.

    Args:
        cin: Channels in.
        cout: Channels out.
        kernel: Side of the shortcut's depthwise kernel.
        act: Activation name.
    """

    def __init__(self, cin: int, cout: int, kernel: int, act: str) -> None:
        super().__init__()
        self.blocks = nn.Sequential(GhostBottleneck(cin, cout, kernel, act))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, cin, H, W] to [B, cout, H, W]."""
        out: Tensor = self.blocks(x)
        return out


class GhostPAN(nn.Module):
    """Top-down and bottom-up fusion of three levels, and a fourth at twice the last stride.

    Args:
        channels: Channels of every output level.
        kernel: Side of the depthwise kernels.
        act: Activation name.
    """

    def __init__(self, channels: int, kernel: int, act: str) -> None:
        super().__init__()
        self.reduce_layers = nn.ModuleList(
            ConvNormAct(cin, channels, 1, activation=act) for cin in STAGE_CHANNELS[1:]
        )
        pair = range(2)
        self.top_down_blocks = nn.ModuleList(
            GhostBlocks(2 * channels, channels, kernel, act) for _ in pair
        )
        self.downsamples = nn.ModuleList(DepthwiseSeparable(channels, kernel, 2, act) for _ in pair)
        self.bottom_up_blocks = nn.ModuleList(
            GhostBlocks(2 * channels, channels, kernel, act) for _ in pair
        )
        self.extra_lvl_in_conv = nn.ModuleList([DepthwiseSeparable(channels, kernel, 2, act)])
        self.extra_lvl_out_conv = nn.ModuleList([DepthwiseSeparable(channels, kernel, 2, act)])

    def forward(self, x2: Tensor, x3: Tensor, x4: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Map the backbone's three levels to four of equal channels, strides 8, 16, 32, 64."""
        low = self.reduce_layers[0](x2)
        mid = self.reduce_layers[1](x3)
        top = self.reduce_layers[2](x4)
        mid = self.top_down_blocks[0](torch.cat([_double(top), mid], 1))
        out8 = self.top_down_blocks[1](torch.cat([_double(mid), low], 1))
        out16 = self.bottom_up_blocks[0](torch.cat([self.downsamples[0](out8), mid], 1))
        out32 = self.bottom_up_blocks[1](torch.cat([self.downsamples[1](out16), top], 1))
        out64 = self.extra_lvl_in_conv[0](top) + self.extra_lvl_out_conv[0](out32)
        return out8, out16, out32, out64


def _double(x: Tensor) -> Tensor:
    """Upsample [B, C, H, W] to [B, C, 2H, 2W], bilinear with half-pixel centres."""
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


class NanoDetPlusHead(nn.Module):
    """Two depthwise-separable layers and a 1x1 prediction for each level, nothing shared.

    Args:
        channels: Channels in and of the hidden layers.
        outputs: Channels of the prediction: classes + 4 * bins.
        levels: How many levels.
        kernel: Side of the depthwise kernels.
        act: Activation name.
    """

    def __init__(self, channels: int, outputs: int, levels: int, kernel: int, act: str) -> None:
        super().__init__()
        self.cls_convs = nn.ModuleList(
            nn.ModuleList(DepthwiseSeparable(channels, kernel, 1, act) for _ in range(2))
            for _ in range(levels)
        )
        self.gfl_cls = nn.ModuleList(nn.Conv2d(channels, outputs, 1) for _ in range(levels))

    def forward(self, levels: tuple[Tensor, ...]) -> list[Tensor]:
        """Map each [B, channels, H_l, W_l] to raw predictions [B, outputs, H_l, W_l]."""
        maps = []
        for x, pair, last in zip(levels, self.cls_convs, self.gfl_cls, strict=True):
            first, second = pair.children()
            maps.append(last(second(first(x))))
        return maps


class NanoDetPlus(DetectorNet):
    """NanoDet-Plus-m.

    Args:
        num_classes: Classes to tell apart.
        reg_max: Box distances are a distribution over ``reg_max + 1`` bins.
        activation: A key of :data:`~edgesight.models.nets.common.ACTIVATIONS`.
    """

    net_name = "nanodet_plus_m"
    spec_head = "nanodet_plus"
    strides = (8, 16, 32, 64)

    def __init__(
        self, num_classes: int = 80, reg_max: int = 7, activation: str = "leaky_relu"
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.reg_max = reg_max
        channels, kernel = 96, 5
        outputs = num_classes + 4 * (reg_max + 1)
        self.backbone = ShuffleNetV2(activation)
        self.fpn = GhostPAN(channels, kernel, activation)
        self.head = NanoDetPlusHead(channels, outputs, len(self.strides), kernel, activation)
        self._init_weights()

    def _init_weights(self) -> None:
        """Start the predictions near zero boxes and a score of 0.01."""
        for last in self.head.gfl_cls:
            if isinstance(last, nn.Conv2d) and last.bias is not None:
                nn.init.normal_(last.weight, std=0.01)
                nn.init.constant_(last.bias, -math.log(0.99 / 0.01))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map [B, 3, H, W] to four maps [B, classes + 4 * (reg_max + 1), H_l, W_l] of logits.

        H and W are multiples of 32; the stride-64 level is rounded up (7x7 for 416x416).
        """
        levels: list[Tensor] = self.head(self.fpn(*self.backbone(x)))
        return levels

    def tail(self, levels: list[Tensor]) -> Tensor:
        """Return [B, N, classes + 4 * (reg_max + 1)]: class scores after sigmoid, then box logits.

        N counts the cells of all levels, finest level first, row by row.
        """
        flat = []
        for level in levels:
            scores = level[:, : self.num_classes].sigmoid()
            flat.append(torch.cat([scores, level[:, self.num_classes :]], 1).flatten(2))
        return torch.cat(flat, 2).permute(0, 2, 1)
