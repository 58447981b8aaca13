"""Several processes that train one network: started by ``torchrun``, on one machine or several.

Every process carries out the same recipe in the same folder (machines share it). The first writes;
the others wait for what it has written. In distillation each takes its part of every batch, and
what the parts have found is added up, so that the result is that of one process with the whole
batch. Alone, everything here does nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..models.errors import RecipeError

PATIENCE = datetime.timedelta(days=7)
"""So long the others wait while the first process prunes or measures."""


def start() -> None:
    """Joins the processes that ``torchrun`` has started; nothing if it was not used.

    Raises:
        RecipeError: The other processes cannot be reached.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        message = (
            f"expected {os.environ['WORLD_SIZE']} processes that reach each other, found: "
            f"{' '.join(str(error).split())[:160]}; start them with torchrun"
        )
        raise RecipeError(message) from error
    atexit.register(stop)


def stop() -> None:
    """Leaves the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def count() -> int:
    """Returns how many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Returns this process' number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Returns whether this process is the one that writes."""
    return rank() == 0


def meet() -> None:
    """Waits until every process is here."""
    total(torch.zeros(1))


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """The first process does the block alone; then the others do, and find what it has written."""
    if not is_first():
        meet()
    yield
    if is_first():
        meet()


def device(wanted: str = "auto") -> torch.device:
    """Returns where to compute: ``cpu``, ``cuda``, or ``auto``: on a GPU if there is one.

    On a machine with several GPUs each process has one of its own.

    Raises:
        RecipeError: ``cuda`` is wanted and there is none.
    """
    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        message = 'device: expected a GPU that torch can use, found none; say device = "auto"'
        raise RecipeError(message)
    if wanted == "cpu" or not there:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def total(value: Tensor) -> Tensor:
    """Returns the sum over all processes, without gradient; the value itself if there is one."""
    if count() == 1:
        return value
    result = value.detach().clone()
    dist.all_reduce(result)
    return result


def variance(value: Tensor) -> Tensor:
    """Returns the variance over all numbers of all processes, a scalar."""
    if count() == 1:
        return value.var()
    sums = total(torch.stack([value.new_tensor(float(value.numel())), value.sum()]))
    spread = total((value - sums[1] / sums[0]).square().sum())
    return spread / (sums[0] - 1)


def add_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Adds up the gradients of all processes; a parameter that none has used stays without."""
    if count() == 1:
        return
    given = list(parameters)
    flat = [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in given]
    used = flat[0].new_tensor([float(p.grad is not None) for p in given])
    summed = total(torch.cat([*flat, used]))
    parts = torch.split(summed, [f.numel() for f in flat] + [len(given)])
    for parameter, gradient, some in zip(given, parts, parts[-1].tolist(), strict=False):
        if some:
            parameter.grad = gradient.reshape(parameter.shape).clone()
