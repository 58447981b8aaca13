"""The training loop: resumable, with weights averaged over time, for CPUs and GPUs."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..models.errors import ModelFileError, RecipeError
from ..models.files import atomic_path
from ..models.nets.common import DetectorNet
from .assign import label_loss
from .distill import FeatureTap, LossWeights, feature_loss, output_loss
from .photos import Batch, PhotoStream


@dataclass(frozen=True)
class TrainConfig:
    """How long and how fast to train.

    Attributes:
        photos: Photo passes in all.
        batch: Photos per step.
        rate: Largest step, relative to each channel's own weight size.
        warmup: Part of the run in which the rate rises.
        ema: Decay per step of the averaged weights.
        seed: Of order and augmentation.
        save_s: Seconds between checkpoints.
        weights: Of the terms of the loss.
        mixed: Compute in bfloat16 where that is safe (5 times as fast on a CPU that has it).
    """

    photos: int = 20_000
    batch: int = 8
    rate: float = 7e-4
    warmup: float = 0.05
    ema: float = 0.998
    seed: int = 0
    save_s: float = 120.0
    weights: LossWeights = field(default_factory=LossWeights)
    mixed: bool = True


class RelativeAdam(torch.optim.Optimizer):
    """Adam (arXiv 1412.6980) whose steps are relative to the size of each output channel's weights.

    Detectors come with their normalisation folded into the convolutions, so weights of two channels
    can differ a thousandfold and no one rate fits both. Measuring each step in the channel's own
    units (as LARS does per layer, arXiv 1708.03888) makes one rate fit all.

    Args:
        params: Parameters; the first axis is the output channel.
        rate: Step relative to a channel's root-mean-square weight.
    """

    def __init__(self, params: Iterable[nn.Parameter], rate: float) -> None:
        super().__init__(params, {"rate": rate})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Takes one step."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    size = p.flatten(1).square().mean(1).sqrt() if p.ndim > 1 else p.abs()
                    floor = size.mean() * (0.1 if p.ndim > 1 else 0.5) + 1e-8
                    state["scale"] = size.clamp_min(floor).reshape(-1, *[1] * (p.ndim - 1))
                    state["m"], state["v"] = torch.zeros_like(p), torch.zeros_like(p)
                    state["t"] = 0
                state["t"] += 1
                state["m"].lerp_(p.grad, 0.1)
                state["v"].lerp_(p.grad.square(), 0.001)
                m = state["m"] / (1 - 0.9 ** state["t"])
                v = state["v"] / (1 - 0.999 ** state["t"])
                p.addcmul_(state["scale"], m / (v.sqrt() + 1e-12), value=-group["rate"])


def train(
    net: DetectorNet,
    teacher: DetectorNet,
    stream: PhotoStream,
    config: TrainConfig,
    checkpoint: Path,
    rows: dict[str, Tensor] | None = None,
    score: Callable[[DetectorNet], float] | None = None,
    progress: bool = True,
) -> DetectorNet:
    """Distils ``teacher`` into ``net`` and returns the averaged student.

    A run that was stopped goes on from ``checkpoint`` and ends with the same weights as one that
    was not (same machine, same thread count).

    Args:
        net: The student, normalisation folded.
        teacher: The uncut network.
        stream: Batches of photos.
        config: How long and how fast.
        checkpoint: File to resume from and to save to.
        rows: Conv name -> the teacher's output channels that the student still has.
        score: Called on the averaged student at each checkpoint; only logged.
        progress: Show a bar on stderr.

    Raises:
        RecipeError: The loss is not finite: the rate is too high.
        ModelFileError: The checkpoint is of another run.
    """
    torch.set_flush_denormal(True)  # tiny gradients are a hundred times slower on x86 otherwise
    steps = max(1, math.ceil(config.photos / config.batch))
    averaged = copy.deepcopy(net).eval()
    optimizer = RelativeAdam([p for p in net.parameters() if p.requires_grad], config.rate)
    key = run_key(net, config, stream, rows)
    first = _resume(checkpoint, key, net, averaged, optimizer)
    teacher = copy.deepcopy(teacher).eval()
    for each in (net, teacher):  # the layout in which CPUs and GPUs convolve fastest
        each.to(memory_format=torch.channels_last)
    mine, theirs = FeatureTap(net), FeatureTap(teacher, rows)
    bar = tqdm(total=steps, initial=first, desc="distil", unit="step", disable=not progress)
    step, saved_s = first, time.monotonic()
    try:
        for batch in stream.batches(first, steps):
            for group in optimizer.param_groups:
                group["rate"] = config.rate * _schedule(step / steps, config.warmup)
            with _undisturbed():  # a step counts whole or not at all, also at Ctrl-C
                terms = _step(net, teacher, mine, theirs, batch, config, optimizer)
                step += 1
                follow(averaged, net, config.ema, step)
            bar.update()
            bar.set_postfix({k: f"{v:.3f}" for k, v in terms.items()}, refresh=False)
            if time.monotonic() - saved_s > config.save_s:
                save_checkpoint(checkpoint, key, step, net, averaged, optimizer)
                saved_s = time.monotonic()
                if score is not None:
                    tqdm.write(f"step {step}: {score(averaged):.2f}")
    finally:  # also at Ctrl-C: nothing is lost
        if step > first:
            save_checkpoint(checkpoint, key, step, net, averaged, optimizer)
        bar.close()
        mine.close()
        theirs.close()
    return averaged


@torch.no_grad()
def follow(averaged: nn.Module, net: nn.Module, ema: float, step: int) -> None:
    """Moves averaged weights towards the newest; early on faster than ``ema`` says."""
    decay = min(ema, step / (step + 10))
    for ours, new in zip(averaged.parameters(), net.parameters(), strict=True):
        ours.lerp_(new, 1 - decay)


def _step(
    net: DetectorNet,
    teacher: DetectorNet,
    mine: FeatureTap,
    theirs: FeatureTap,
    batch: Batch,
    config: TrainConfig,
    optimizer: RelativeAdam,
) -> dict[str, float]:
    device = next(net.parameters()).device
    images = batch.images.to(device, memory_format=torch.channels_last)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=config.mixed):
        with torch.no_grad():
            goal = [level.float() for level in teacher(images)]
        output = [level.float() for level in net(images)]
    scores, boxes = output_loss(net, output, goal)
    features = feature_loss(mine.take(), theirs.take())
    weights = config.weights
    loss = weights.scores * scores + weights.boxes * boxes + weights.features * features
    terms = {"scores": scores, "boxes": boxes, "features": features}
    if batch.targets is not None:
        terms["label_scores"], terms["label_boxes"] = label_loss(net, output, batch.targets)
        loss = loss + weights.labels * (terms["label_scores"] + terms["label_boxes"])
    if not bool(torch.isfinite(loss)):
        message = (
            f"expected a finite loss, found {float(loss.detach())}; lower the rate of the step"
        )
        raise RecipeError(message)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return {name: float(term.detach()) for name, term in terms.items()}


def _schedule(part: float, warmup: float) -> float:
    """Rises linearly, then falls as a cosine to 2 %."""
    if part < warmup:
        return max(part / warmup, 0.02)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (part - warmup) / (1 - warmup)))


def run_key(
    net: nn.Module,
    config: TrainConfig,
    stream: PhotoStream,
    rows: dict[str, Tensor] | None = None,
) -> str:
    """Returns what tells one run from another: shapes, settings, photos, labels, input size."""
    shapes = {name: list(p.shape) for name, p in net.named_parameters()}
    kept = {name: index.tolist() for name, index in (rows or {}).items()}
    settings = {k: v for k, v in asdict(config).items() if k != "save_s"}  # no result hangs on it
    parts = [shapes, settings, kept, stream.description()]
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Holds back Ctrl-C until the block is done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def save_checkpoint(
    path: Path,
    key: str,
    step: int,
    net: nn.Module,
    averaged: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Saves everything that a run needs to go on."""
    state: dict[str, Any] = {
        "key": key,
        "step": step,
        "net": net.state_dict(),
        "averaged": averaged.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        torch.save(state, file)


def _resume(
    path: Path, key: str, net: nn.Module, averaged: nn.Module, optimizer: RelativeAdam
) -> int:
    if not path.is_file():
        return 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["key"] != key:
            message = f"{path}: expected a checkpoint of this run, found another's; remove it"
            raise ModelFileError(message)
        net.load_state_dict(state["net"])
        averaged.load_state_dict(state["averaged"])
        optimizer.load_state_dict(state["optimizer"])
        return int(state["step"])
    except ModelFileError:
        raise
    except Exception as error:  # a damaged pickle can end in nearly any exception
        message = f"{path}: expected a checkpoint, found one that cannot be read; remove it"
        raise ModelFileError(message) from error
