"""Other activations: ReLU in place of LeakyReLU, SiLU or hard-swish, with what follows refitted.

An integer convolution runs a ReLU inside itself for nothing: the lower end of its grid is zero.
Any other activation is an operator of its own on one more grid, costs instructions (SiLU more than
a quarter of YOLOX-nano's on a Cortex-A76) and rounds twice. Swapped blindly, a detector finds
nothing; but each convolution behind can be fitted anew, in the least-squares sense, to what it
gave before (``compensate.refit``), which leaves to distillation only what is lost in kind.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Final

from torch import nn

REPLACEABLE: Final[dict[str, tuple[type[nn.Module], ...]]] = {
    "leaky_relu": (nn.LeakyReLU, nn.PReLU, nn.RReLU),
    "silu": (nn.SiLU, nn.Mish, nn.GELU),
    "hard_swish": (nn.Hardswish,),
    "elu": (nn.ELU, nn.CELU, nn.SELU),
}
"""Kind of activation -> modules that are of it."""
NEW: Final[dict[str, type[nn.Module]]] = {"relu": nn.ReLU, "relu6": nn.ReLU6}
"""What integer convolutions run inside themselves."""


def activations_of(net: nn.Module) -> dict[str, str]:
    """Returns the replaceable activations of a network: module name -> kind."""
    return {
        name: kind
        for name, module in net.named_modules()
        for kind, types in REPLACEABLE.items()
        if isinstance(module, types)
    }


def replace_activations(net: nn.Module, names: Collection[str], to: str) -> nn.Module:
    """Returns a copy of a network with the named activations replaced.

    Args:
        net: It stays as it is.
        names: Of modules, as ``activations_of`` returns them.
        to: A key of ``NEW``.

    Raises:
        KeyError: There is no such module or activation.
    """
    result = copy.deepcopy(net)
    modules = dict(result.named_modules())
    for name in names:
        owner, _, attribute = name.rpartition(".")
        if name not in modules:
            message = f"no activation {name!r}"
            raise KeyError(message)
        setattr(modules[owner], attribute, NEW[to]())
    return result.train(net.training)
