"""Building blocks and the interface that every network here has.

Two rules keep the networks friendly to pruning, quantization and ``torch.fx``:

* an activation is its own module instance, used once per forward pass;
* a convolution is registered directly before the normalisation that follows it, so that
  :func:`fold_batchnorm` can find the pairs from the module tree alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn

ACTIVATIONS: Final[dict[str, Callable[[], nn.Module]]] = {
    "silu": nn.SiLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.1),
    "relu": nn.ReLU,
    "hard_swish": nn.Hardswish,
    "none": nn.Identity,
}
"""Activation name -> maker of a *new* module; never hand one instance to two places."""


def make_activation(name: str) -> nn.Module:
    """Make a new activation module.

    Args:
        name: A key of :data:`ACTIVATIONS`.

    Returns:
        A module of its own, not shared with any other place.

    Raises:
        ValueError: For a name that is not in the table.
    """
    try:
        return ACTIVATIONS[name]()
    except KeyError:
        message = f"expected an activation out of {sorted(ACTIVATIONS)}, found {name!r}"
        raise ValueError(message) from None


class ConvNormAct(nn.Module):
    """Convolution without bias, batch normalisation, activation; 'same' padding for odd kernels.

    Args:
        in_channels: Channels in.
        out_channels: Channels out.
        kernel: Side of the square kernel, odd.
        stride: Stride of the convolution.
        groups: Groups of the convolution (``in_channels`` makes it depthwise).
        activation: A key of :data:`ACTIVATIONS`.
        eps: The normalisation's epsilon (it changes results: take the one trained with).
        momentum: The normalisation's momentum.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        activation: str = "silu",
        eps: float = 1e-5,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False
        )
        self.bn: nn.Module = nn.BatchNorm2d(out_channels, eps=eps, momentum=momentum)
        self.act = make_activation(activation)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, in, H, W] to [B, out, H / stride, W / stride] (rounded up)."""
        out: Tensor = self.act(self.bn(self.conv(x)))
        return out


class DetectorNet(nn.Module):
    """What every detector network offers.

    Attributes:
        net_name: The name in :data:`edgesight.models.nets.build.NETS`.
        spec_head: Which decoder reads the outputs: ``yolox``, ``nanodet_plus`` or ``ssdlite``.
        strides: Input pixels per cell of each level, finest first.
        num_classes: How many classes are told apart (a background column is not counted).
    """

    net_name: str
    spec_head: str
    strides: tuple[int, ...]
    num_classes: int

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map a normalised float32 batch [B, 3, H, W] to raw maps of logits, finest level first."""
        raise NotImplementedError

    def tail(self, levels: list[Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        """Turn :meth:`forward`'s maps into the layout of the deployed ONNX file."""
        raise NotImplementedError

    def export_forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return ``tail(forward(x))``: what the deployed ONNX file computes."""
        return self.tail(self.forward(x))


class WithTail(nn.Module):
    """A network whose ``forward`` is ``export_forward``: what ``torch.onnx.export`` is given.

    Args:
        net: The network to wrap; not copied.
    """

    def __init__(self, net: DetectorNet) -> None:
        super().__init__()
        self.net = net
        self.training = net.training  # else an exporter that restores the mode puts it in the net

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return ``net.export_forward(x)`` for x [B, 3, H, W]."""
        return self.net.export_forward(x)


def has_batchnorm(module: nn.Module) -> bool:
    """Say whether any batch normalisation is left in a module."""
    return any(isinstance(child, nn.BatchNorm2d) for child in module.modules())


@torch.no_grad()
def _fold_pair(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
    """Write into ``conv`` what ``bn(conv(x))`` computes in eval mode (in float64 on the way)."""
    mean, var = bn.running_mean, bn.running_var
    if mean is None or var is None:
        message = "expected batch normalisation with running statistics, found none"
        raise ValueError(message)
    gain = (var.double() + bn.eps).rsqrt()
    if bn.affine:
        gain = gain * bn.weight.double()
    shift = -mean.double() * gain
    if bn.affine:
        shift = shift + bn.bias.double()
    if conv.bias is not None:
        shift = shift + conv.bias.double() * gain
    weight = conv.weight.double() * gain.reshape(-1, 1, 1, 1)
    conv.weight.copy_(weight)
    conv.bias = nn.Parameter(shift.to(conv.weight.dtype), requires_grad=conv.weight.requires_grad)


def fold_batchnorm(module: nn.Module, remember: bool = False) -> int:
    """Fold every convolution + batch normalisation pair in place; exact in eval mode.

    A pair is a ``Conv2d`` and the ``BatchNorm2d`` registered right after it in the same parent.
    The normalisation becomes an ``Identity``, the convolution gets a bias.

    Args:
        module: Any module tree; it is changed.
        remember: Leave the normalisation's scales with the convolution, as ``bn_scale`` (a plain
            tensor ``[out]``): pruning may ask for them.

    Returns:
        How many pairs were folded (0 for a tree that was folded before).
    """
    folded = 0
    for parent in list(module.modules()):
        previous: nn.Module | None = None
        for name, child in list(parent.named_children()):
            if (
                isinstance(child, nn.BatchNorm2d)
                and isinstance(previous, nn.Conv2d)
                and previous.out_channels == child.num_features
            ):
                _fold_pair(previous, child)
                if remember and child.affine:
                    previous.bn_scale = child.weight.detach().abs().clone()
                setattr(parent, name, nn.Identity())
                folded += 1
            previous = child
    return folded
