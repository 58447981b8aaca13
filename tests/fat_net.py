"""A torch detector whose dense convolutions repeat themselves: what factorising is for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from edgesight.models.nets.common import DetectorNet
from torch import Tensor, nn


class Fat(DetectorNet):
    """Dense 3x3 convolutions that repeat themselves, attention by a linear layer, depthwise."""

    net_name, spec_head, strides, num_classes = "fat", "yolox", (8, 16, 32), 3

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 4, 1)
        self.deep = nn.Conv2d(width, width, 3, 1, 1, groups=width)
        self.down = nn.ModuleList(nn.Conv2d(width, width, 3, 2, 1) for _ in range(3))
        self.mix = nn.Conv2d(width, width, 1, bias=False)
        self.look = nn.Linear(width, width)
        self.last = nn.ModuleList(nn.Conv2d(width, 8, 1) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.relu(self.deep(F.relu(self.stem(x))))
        x = x * torch.sigmoid(self.look(x.mean((2, 3))))[:, :, None, None]
        x = F.relu(self.mix(x))
        levels = []
        for down, last in zip(self.down, self.last, strict=True):
            x = F.relu(down(x))
            levels.append(last(x))
        return levels

    def tail(self, levels: list[Tensor]) -> Tensor:
        flat = [torch.cat([m[:, :4], m[:, 4:].sigmoid()], 1).flatten(2) for m in levels]
        return torch.cat(flat, 2).permute(0, 2, 1)


def fat(num_classes: int = 3) -> Fat:
    """A network whose 3x3 convolutions are of rank 12 in every sense, but for a little noise."""
    torch.manual_seed(0)
    net = Fat().eval()
    with torch.no_grad():
        net.stem.weight.mul_(0.05)
        for down in net.down:
            assert isinstance(down, nn.Conv2d)
            terms = [torch.randn(size, 12) for size in down.weight.shape]
            low = torch.einsum("or,cr,ir,jr->ocij", *terms)
            down.weight.copy_(low / low.std() * down.weight.std() + 1e-3 * down.weight)
    return net


def photo(side: int = 64) -> Tensor:
    coarse = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    return F.interpolate(100 * coarse + 110, size=side, mode="bilinear")
