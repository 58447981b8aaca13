"""A torch detector of a few thousand weights, with everything that pruning and export meet."""

from __future__ import annotations

import torch
from edgesight.models.nets.common import ConvNormAct, DetectorNet
from torch import Tensor, nn


class TinyNet(DetectorNet):
    """YOLOX's output layout on four plain blocks."""

    net_name = "tiny"
    spec_head = "yolox"
    strides = (8, 16, 32)

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.stem = ConvNormAct(3, 16, 3, 4, activation="leaky_relu")
        self.down = nn.ModuleList(
            ConvNormAct(a, b, 3, 2, activation="leaky_relu")
            for a, b in ((16, 32), (32, 32), (32, 32))
        )
        self.predict = nn.ModuleList(nn.Conv2d(32, 5 + num_classes, 1) for _ in self.strides)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map [B, 3, H, W] to three maps [B, 5 + classes, H_l, W_l]."""
        x = self.stem(x)
        levels = []
        for down, predict in zip(self.down, self.predict, strict=True):
            x = down(x)
            levels.append(predict(x))
        return levels

    def tail(self, levels: list[Tensor]) -> Tensor:
        """Return [B, N, 5 + classes], as YOLOX's file has it."""
        flat = [torch.cat([m[:, :4], m[:, 4:].sigmoid()], 1).flatten(2) for m in levels]
        return torch.cat(flat, 2).permute(0, 2, 1)


def make(num_classes: int = 3) -> TinyNet:
    """What a recipe names: ``module = "tiny_net:make"``; sees boxes with random weights."""
    net = TinyNet(num_classes)
    with torch.no_grad():
        net.stem.conv.weight.mul_(0.05)
        for predict in net.predict:
            assert isinstance(predict, nn.Conv2d)
            assert predict.bias is not None
            predict.weight[:4].mul_(0.1)
            predict.weight[4:].mul_(4)
            predict.bias[2:4] += 0.7
            predict.bias[4:] += 0.5
    return net.eval()
