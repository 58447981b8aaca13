"""The training loop: resumable, with weights averaged over time, for CPUs and GPUs.

It can be shared by several processes (``parallel``), each with its part of every batch.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..models.errors import ModelFileError, RecipeError
from ..models.files import atomic_path
from ..models.nets.common import DetectorNet
from . import parallel
from .assign import Targets, label_loss
from .distill import FeatureTap, LossWeights
from .photos import Batch, PhotoStream
from .sparse import SparseMasks, masks_of
from .teachers import Guide, Seen, Term, Twin

ADAPTER_GAIN = 10.0
"""Adapters start from nothing and learn so many times as fast as the student."""
NOT_IN_KEY = ("save_s", "device")
"""Settings on which no result hangs."""


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
        temperature: Softens scores and distributions of student and teacher.
        device: ``auto``, ``cpu`` or ``cuda``.
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
    temperature: float = 1.0
    device: str = "auto"


class RelativeAdam(torch.optim.Optimizer):
    """Adam (arXiv 1412.6980) whose steps are relative to the size of each output channel's weights.

    Detectors come with their normalisation folded into the convolutions, so weights of two channels
    can differ a thousandfold and no one rate fits both. Measuring each step in the channel's own
    units (as LARS does per layer, arXiv 1708.03888) makes one rate fit all.

    Args:
        params: Parameters (the first axis is the output channel), or groups of them.
        rate: Step relative to a channel's root-mean-square weight.
    """

    def __init__(
        self, params: Iterable[nn.Parameter] | Iterable[dict[str, Any]], rate: float
    ) -> None:
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
    teacher: DetectorNet | Sequence[Guide],
    stream: PhotoStream,
    config: TrainConfig,
    checkpoint: Path,
    rows: dict[str, Tensor] | None = None,
    score: Callable[[DetectorNet], float] | None = None,
    progress: bool = True,
) -> DetectorNet:
    """Distils teachers into ``net`` and returns the averaged student.

    A run that was stopped goes on from ``checkpoint`` and ends with the same weights as one that
    was not (same machine, same thread count, on a CPU).

    Args:
        net: The student, normalisation folded.
        teacher: The uncut network, or any teachers.
        stream: Batches of photos, with the views that the teachers want.
        config: How long and how fast.
        checkpoint: File to resume from and to save to.
        rows: Conv name -> the uncut network's output channels that the student still has.
        score: Called on the averaged student at each checkpoint; only logged.
        progress: Show a bar on stderr.

    Raises:
        RecipeError: The loss is not finite: the rate is too high; the checkpoint before stays. Or
            the batch cannot be shared, or there is no such device.
        ModelFileError: The checkpoint is of another run.
    """
    torch.set_flush_denormal(True)  # tiny gradients are a hundred times slower on x86 otherwise
    if stream.batch % parallel.count():
        message = (
            f"distill.batch: expected a multiple of the {parallel.count()} processes that share "
            f"it, found {stream.batch}"
        )
        raise RecipeError(message)
    device = parallel.device(config.device)
    steps = max(1, math.ceil(config.photos / config.batch))
    averaged = copy.deepcopy(net).eval().to(device)
    net.to(device)
    guides: Sequence[Guide] = [Twin(teacher, rows)] if isinstance(teacher, DetectorNet) else teacher
    for guide in guides:
        guide.begin(net, device, config.seed)
    adapters = nn.ModuleList(g.adapters for g in guides if g.adapters is not None)
    groups: list[dict[str, Any]] = [{"params": [p for p in net.parameters() if p.requires_grad]}]
    if len(adapters):
        groups.append({"params": list(adapters.parameters()), "gain": ADAPTER_GAIN})
    optimizer = RelativeAdam(groups, config.rate)
    key = run_key(net, config, stream, guides)
    first = _resume(checkpoint, key, net, averaged, optimizer, adapters)
    parallel.meet()  # nobody overwrites what another still has to read
    net.to(memory_format=torch.channels_last)  # in which CPUs and GPUs convolve fastest
    loop = _Loop(net, guides, config, optimizer, masks_of(net))
    shown = progress and parallel.is_first()
    bar = tqdm(total=steps, initial=first, desc="distil", unit="step", disable=not shown)
    step, saved_s, sound = first, time.monotonic(), True

    def save() -> None:
        if parallel.is_first():
            save_checkpoint(checkpoint, key, step, net, averaged, optimizer, adapters)

    try:
        for batch in stream.batches(first, steps):
            for group in optimizer.param_groups:
                rate = config.rate * _schedule(step / steps, config.warmup)
                group["rate"] = rate * group.get("gain", 1.0)
            before_step(net, step / steps)
            with _undisturbed():  # a step counts whole or not at all, also at Ctrl-C
                terms = loop.step(batch)
                step += 1
                follow(averaged, net, config.ema, step)
            bar.update()
            bar.set_postfix({k: f"{v:.3f}" for k, v in terms.items()}, refresh=False)
            if time.monotonic() - saved_s > config.save_s:
                save()
                saved_s = time.monotonic()
                if score is not None:
                    tqdm.write(f"step {step}: {score(averaged):.2f}")
    except RecipeError:  # the weights are spoiled: the checkpoint before stays
        sound = False
        raise
    finally:  # also at Ctrl-C: nothing is lost
        if step > first and sound:
            save()
        bar.close()
        loop.close()
    net.cpu()
    return averaged.cpu()


def before_step(net: nn.Module, part: float) -> None:
    """Sets what changes in the course of a run: called before each step.

    Args:
        net: The student.
        part: How much of the run is done, 0..1; hangs on the step alone, so that a resumed run
            goes the same way.
    """


@torch.no_grad()
def follow(averaged: nn.Module, net: nn.Module, ema: float, step: int) -> None:
    """Moves averaged weights towards the newest; early on faster than ``ema`` says."""
    decay = min(ema, step / (step + 10))
    for ours, new in zip(averaged.parameters(), net.parameters(), strict=True):
        ours.lerp_(new, 1 - decay)


class _Loop:
    """What one step of the training does.

    Args:
        net: The student.
        guides: Its teachers.
        config: How to train.
        optimizer: Over the student's weights and the adapters'.
        masks: Weights that stay zero.
    """

    def __init__(
        self,
        net: DetectorNet,
        guides: Sequence[Guide],
        config: TrainConfig,
        optimizer: RelativeAdam,
        masks: SparseMasks | None,
    ) -> None:
        self.net, self.guides, self.config, self.masks = net, guides, config, masks
        self.optimizer = optimizer
        self.tap = FeatureTap(net)

    def close(self) -> None:
        """Stops listening to features."""
        self.tap.close()
        for guide in self.guides:
            guide.close()

    def step(self, batch: Batch) -> dict[str, float]:
        """Learns from one batch; returns the terms of the loss."""
        net, config = self.net, self.config
        device = next(net.parameters()).device
        images = batch.images.to(device, memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.mixed):
            with torch.no_grad():
                goals = [guide.look(images, batch.views) for guide in self.guides]
            output = [level.float() for level in net(images)]
        seen = Seen(output, self.tap.take())
        found: list[Term] = []
        for guide, goal in zip(self.guides, goals, strict=True):
            found += guide.terms(net, seen, goal, batch, config.temperature)
        terms = _averaged(found)
        parts = [getattr(config.weights, name) * term for name, term in terms.items()]
        if batch.targets is not None:
            targets = [_on(device, target) for target in batch.targets]
            terms["label_scores"], terms["label_boxes"] = label_loss(net, output, targets)
            parts.append(config.weights.labels * (terms["label_scores"] + terms["label_boxes"]))
        loss = parts[0]
        for part in parts[1:]:
            loss = loss + part
        shown = parallel.total(torch.stack([loss, *terms.values()]).detach()).tolist()
        if not math.isfinite(shown[0]):
            _refuse("loss", shown[0])
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parallel.add_gradients(p for g in self.optimizer.param_groups for p in g["params"])
        self.optimizer.step()
        if self.masks is not None:
            self.masks.apply_(net)
        if not all(bool(torch.isfinite(p).all()) for p in net.parameters()):
            _refuse("weight", math.nan)
        return dict(zip(terms, shown[1:], strict=True))


def _refuse(what: str, found: float) -> NoReturn:
    message = f"expected a finite {what}, found {found}; lower the rate of the step"
    raise RecipeError(message)


def _averaged(terms: Sequence[Term]) -> dict[str, Tensor]:
    """Returns the terms by name; those that several teachers give, averaged."""
    names: dict[str, list[Tensor]] = {}
    for name, term in terms:
        names.setdefault(name, []).append(term)
    return {n: ts[0] if len(ts) == 1 else torch.stack(ts).mean() for n, ts in names.items()}


def _on(device: torch.device, target: Targets) -> Targets:
    return Targets(target.xyxy.to(device), target.label.to(device), target.weight.to(device))


def _schedule(part: float, warmup: float) -> float:
    """Rises linearly, then falls as a cosine to 2 %."""
    if part < warmup:
        return max(part / warmup, 0.02)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (part - warmup) / (1 - warmup)))


def run_key(
    net: nn.Module,
    config: TrainConfig,
    stream: PhotoStream,
    guides: Sequence[Guide] = (),
) -> str:
    """Returns what tells one run from another: shapes, settings, photos, labels, teachers."""
    shapes = {name: list(p.shape) for name, p in net.named_parameters()}
    settings = {k: v for k, v in asdict(config).items() if k not in NOT_IN_KEY}
    parts = [shapes, settings, [g.describe() for g in guides], stream.description()]
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
    adapters: nn.Module,
) -> None:
    """Saves everything that a run needs to go on."""
    state: dict[str, Any] = {
        "key": key,
        "step": step,
        "net": net.state_dict(),
        "averaged": averaged.state_dict(),
        "optimizer": optimizer.state_dict(),
        "adapters": adapters.state_dict(),
    }
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        torch.save(state, file)


def _resume(
    path: Path,
    key: str,
    net: nn.Module,
    averaged: nn.Module,
    optimizer: RelativeAdam,
    adapters: nn.Module,
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
        adapters.load_state_dict(state["adapters"])
        return int(state["step"])
    except ModelFileError:
        raise
    except Exception as error:  # a damaged pickle can end in nearly any exception
        message = f"{path}: expected a checkpoint, found one that cannot be read; remove it"
        raise ModelFileError(message) from error
