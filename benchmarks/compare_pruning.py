"""Pruning against its peers, and its criteria against each other, at equal cost.

    pip install -e '.[dev,peers]'
    python benchmarks/compare_pruning.py peers --ratio 0.8 0.6
    python benchmarks/compare_pruning.py criteria --ratio 0.6 --input-hw 288 384 --part tuning

Every row starts from the same network, is cut to the same multiply-accumulates (of the original at
its own size) and, where it says so, recovered in the same way: refitted to the uncut network on the
same photos and then, with ``--distill``, trained on the same ones. AP is that of the exported ONNX
file. Rows are stored one by one; a second start goes on behind the last.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from edgesight.compression.compensate import REFIT_RIDGE, few_enough, refit
from edgesight.compression.criteria import CRITERIA, Harm, harm_of, layers
from edgesight.compression.cut import chosen_groups, cut
from edgesight.compression.data import open_photos
from edgesight.compression.export import export_detector
from edgesight.compression.groups import ChannelMap, find_groups
from edgesight.compression.importance import RemovalState, collect_stats
from edgesight.compression.photos import PhotoStream, calibration_batches
from edgesight.compression.prune import (
    COSTS,
    PlanError,
    PruneRules,
    conv_costs,
    macs_of,
    plan_pruning,
    total_cost,
)
from edgesight.compression.recipe import ModelSource
from edgesight.compression.source import Entered, enter
from edgesight.compression.state import rows_kept
from edgesight.compression.train import TrainConfig, train
from edgesight.models.dataset import Dataset, load_image, open_dataset
from edgesight.models.detector import OnnxDetector
from edgesight.models.evaluate import Evaluation, evaluate_detector
from edgesight.models.files import write_json
from edgesight.models.machine import machine
from edgesight.models.nets.common import DetectorNet
from edgesight.models.spec import ModelSpec
from torch import Tensor
from torch_pruning_peer import prune_with_peer

WEIGHTS = {"nanodet_plus_m": "nanodet_plus_m_416.onnx", "yolox_nano": "yolox_nano_416.onnx"}
CORE = "cortex-a76"
TUNING = 5
"""Photos of the training set whose id is a multiple of this are looked at, never learned from."""


@dataclass(frozen=True)
class Method:
    """One way to prune: its name in the table, and what is done."""

    name: str
    rules: PruneRules | None = None  # None: torch-pruning
    criterion: str = "obs"
    iterations: int = 1
    recover: bool = True


PEERS = (
    Method("uniform L2, no recovery", PruneRules(allocation="uniform", align=1), "l2", 1, False),
    Method("uniform L2 + recovery", PruneRules(allocation="uniform", align=1), "l2"),
    Method("torch-pruning + recovery"),
    Method("ours, no recovery", PruneRules(), recover=False),
    Method("ours + recovery", PruneRules()),
    Method("ours in 4 parts + recovery", PruneRules(), iterations=4),
    Method("ours for cortex-a76 + recovery", PruneRules(cost=CORE)),
)
VARIANTS = (
    *(Method(f"{c} by cost", PruneRules(), c) for c in CRITERIA if c != "bn"),
    *(Method(f"obs by cost, in {n} parts", PruneRules(), iterations=n) for n in (2, 4, 8)),
    Method("obs by cost on cortex-a76", PruneRules(cost=CORE)),
    Method("obs global", PruneRules(allocation="global")),
    Method("obs uniform", PruneRules(allocation="uniform")),
    Method("lamp global", PruneRules(allocation="global"), "lamp"),
    Method("taylor global", PruneRules(allocation="global"), "taylor"),
    Method("l2 uniform", PruneRules(allocation="uniform"), "l2"),
)


@dataclass(frozen=True)
class Bench:
    """What all rows share.

    Attributes:
        entered: The original network.
        spec: Of the pruned ones.
        batches: Photos to measure and refit on.
        stream: Photos to train on.
        check: Photos that AP is of.
        before: The original's AP on them.
        distill: Photo passes of training.
        seed: Of everything random.
        known: What was measured of the original.
    """

    entered: Entered
    spec: ModelSpec
    batches: list[Tensor]
    stream: PhotoStream
    check: Dataset
    before: Evaluation
    distill: int
    seed: int
    known: dict[str, Any] = field(default_factory=dict)

    def harm(self, criterion: str, net: DetectorNet, channels: ChannelMap) -> Harm:
        """Returns what removing each group costs; of the original it is measured only once."""
        if net is not self.entered.net:
            return harm_of(criterion, net, channels, self.batches, self.seed)
        if criterion not in self.known:
            if criterion == "obs":
                self.known[criterion] = collect_stats(net, self.batches, self.seed)
            else:
                self.known[criterion] = harm_of(criterion, net, channels, self.batches, self.seed)
        found: Any = self.known[criterion]
        return RemovalState(channels, found) if criterion == "obs" else found


def prune(bench: Bench, method: Method, ratio: float) -> tuple[DetectorNet, dict[str, Tensor]]:
    """Returns a pruned network and conv name -> the rows of the original that it still has."""
    dense, example = bench.entered.net, torch.zeros(1, 3, *bench.spec.input_hw)
    own = torch.zeros(1, 3, *bench.entered.spec.input_hw)
    goal = ratio * total_cost(conv_costs(dense, own), macs_of)
    now = total_cost(conv_costs(dense, example), macs_of)
    if method.rules is None:
        net, rows = prune_with_peer(dense, example, goal)
        if method.recover:
            recover(bench, net, rows)
        return net, rows
    net, edits = dense, list[dict[str, Any]]()
    rows = {}
    sizes = {key: len(members) for key, members in layers(find_groups(net, example)).items()}
    for part in range(1, method.iterations + 1):
        aim = now * (goal / now) ** (part / method.iterations)
        costs, channels = conv_costs(net, example), find_groups(net, example)
        harm = bench.harm(method.criterion, net, channels)
        rules = PruneRules(**{**vars(method.rules), "sizes": sizes})
        plan = plan_pruning(channels, harm, costs, aim / total_cost(costs, macs_of), rules)
        small = cut(net, channels, chosen_groups(channels, plan.removed))
        assert isinstance(small, DetectorNet)
        net = small.eval()
        edits.append({"kind": "cut", "removed": plan.removed})
        rows = rows_kept(dense, edits)
        if method.recover:
            recover(bench, net, rows)
    return net, rows


def recover(bench: Bench, net: DetectorNet, rows: dict[str, Tensor]) -> None:
    """Refits a network in place, as the step ``prune`` does."""
    few = few_enough(bench.batches)
    refit(net, bench.entered.net, rows, few, ridge=REFIT_RIDGE, progress=False)


def row(bench: Bench, method: Method, ratio: float, folder: Path) -> dict[str, Any]:
    """Prunes, recovers and measures; returns one row of the table."""
    start = time.monotonic()
    try:
        net, rows = prune(bench, method, ratio)
    except (PlanError, RuntimeError) as error:
        return {"method": method.name, "ratio": ratio, "failed": str(error)}
    if method.recover and bench.distill:
        config = TrainConfig(photos=bench.distill, batch=bench.stream.batch, seed=bench.seed)
        checkpoint = folder / f"{method.name} {ratio}.pt"
        net = train(net, bench.entered.net, bench.stream, config, checkpoint, rows)
    seconds = time.monotonic() - start
    path = folder / f"{method.name} {ratio}.onnx".replace(" ", "_")
    samples = [load_image(photo.path) for photo in bench.check.photos[:2]]
    export_detector(net.eval(), bench.spec, path, samples)
    found = evaluate_detector(OnnxDetector(path), bench.check, title=method.name)
    own, lost = found.interval(), bench.before.minus(found)
    costs = conv_costs(net, torch.zeros(1, 3, *bench.spec.input_hw))
    return {
        "method": method.name,
        "ratio": ratio,
        "ap": own.value,
        "ap_low": own.low,
        "ap_high": own.high,
        "lost": lost.value,
        "lost_low": lost.low,
        "lost_high": lost.high,
        "photos": len(bench.check),
        "macs": sum(layer.macs for layer in costs.values()),
        f"int8_instructions_{CORE}": round(total_cost(costs, COSTS[CORE])),
        "ms": found.ms_per_photo,
        "seconds": round(seconds, 1),
    }


def as_table(rows: list[dict[str, Any]], whole: float) -> str:
    """Returns the rows as Markdown."""
    lines = [
        "| MACs left | method | MACs (M) | INT8 instructions, A76 (M, estimated) | ms | AP (95 %) "
        "| lost against the original (95 %, paired) |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if "failed" in r:
            lines.append(f"| {r['ratio']} | {r['method']} | - | - | - | failed: {r['failed']} | |")
            continue
        lines.append(
            f"| {r['macs'] / whole:.3f} | {r['method']} | {r['macs'] / 1e6:.0f} "
            f"| {r[f'int8_instructions_{CORE}'] / 1e6:.0f} | {r['ms']:.1f} "
            f"| {r['ap']:.1f} ({r['ap_low']:.1f} to {r['ap_high']:.1f}) "
            f"| {r['lost']:.1f} ({r['lost_low']:.1f} to {r['lost_high']:.1f}) |"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs the comparison that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("what", choices=("peers", "criteria"))
    parser.add_argument("--net", choices=sorted(WEIGHTS), default="nanodet_plus_m")
    parser.add_argument("--ratio", type=float, nargs="+", default=[0.8, 0.6])
    parser.add_argument("--input-hw", type=int, nargs=2, help="input of the pruned network")
    parser.add_argument("--part", choices=("val", "tuning"), default="val")
    parser.add_argument("--photos-max", type=int, help="photos that AP is measured on")
    parser.add_argument("--photos", type=int, default=288, help="photos to refit on")
    parser.add_argument("--distill", type=int, default=0, help="photo passes of training")
    parser.add_argument("--only", nargs="+", default=[], help="rows whose names hold this text")
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="data and weights")
    parser.add_argument("--out", type=Path, default=Path("runs/compare_pruning"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    data = options.shared / "data"
    entered = enter(
        ModelSource(name=options.net, weights=options.shared / "weights" / WEIGHTS[options.net])
    )
    spec = entered.spec
    if options.input_hw:
        spec = spec.with_changes(input_hw=tuple(options.input_hw))
    photos = open_photos([data / "coco-train"], data / "coco-val", TUNING)
    check = photos.check
    if options.part == "tuning":
        check = open_dataset(data / "coco-train").subset(lambda p: p.image_id % TUNING == 0)
    check = check.limit(options.photos_max)
    key = [options.what, options.net, options.part, len(check), list(spec.input_hw)]
    key += [options.photos, options.distill, options.seed]
    folder = options.out / "-".join(str(k).replace(" ", "") for k in key)
    folder.mkdir(parents=True, exist_ok=True)
    original = folder / "original.onnx"
    export_detector(entered.net, entered.spec, original)
    batches = calibration_batches(photos.train_paths, spec, options.photos)
    before = evaluate_detector(OnnxDetector(original), check, title="original")
    stream = PhotoStream(photos.train_paths, spec, 8, options.seed)
    bench = Bench(entered, spec, batches, stream, check, before, options.distill, options.seed)
    example = torch.zeros(1, 3, *entered.spec.input_hw)
    layers_before = conv_costs(entered.net, example)
    whole = total_cost(layers_before, macs_of)
    interval = before.interval()
    methods = [
        m
        for m in (PEERS if options.what == "peers" else VARIANTS)
        if not options.only or any(text in m.name for text in options.only)
    ]
    store = folder / "rows.json"
    rows = json.loads(store.read_text())["rows"] if store.is_file() else []
    for ratio in options.ratio:
        for method in methods:
            if any(r["method"] == method.name and r["ratio"] == ratio for r in rows):
                continue
            rows.append(row(bench, method, ratio, folder))
            told = {"key": key, "machine": machine(), "rows": rows}
            told["original"] = {
                "ap": interval.value,
                "ap_low": interval.low,
                "ap_high": interval.high,
                "macs": whole,
                f"int8_instructions_{CORE}": total_cost(layers_before, COSTS[CORE]),
            }
            write_json(store, told)
            print(as_table(rows[-1:], whole).splitlines()[-1], file=sys.stderr, flush=True)
    print(
        f"{options.net}, {options.part}, {len(check)} photos; original: {whole / 1e6:.0f} M MACs, "
        f"{before.ms_per_photo:.1f} ms, AP {interval.value:.1f} ({interval.low:.1f} to "
        f"{interval.high:.1f})\n"
    )
    print(as_table(rows, whole))


if __name__ == "__main__":
    main()
