"""INT8 after training: ours beside ONNX Runtime's and NNCF's, on the same photos.

    pip install -e '.[dev,peers]'
    python benchmarks/compare_int8.py --net yolox_nano nanodet_plus_m

Every method gets the same float file (pre-processing inside, so that the whole graph counts) and
the same calibration photos, no labels. AP is of ``coco-val``; ``lost`` is paired against the float
file. Instructions are counted by ``edgesight cost`` where its emulator is at hand. A row is stored
as soon as it is measured; a second start goes on behind the last.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from edgesight.compression.calibrate import chosen_photos, read_photos
from edgesight.compression.onnx_io import fold_preprocess, save_model, tidy, write_spec
from edgesight.compression.quantize import QuantizeConfig, quantize
from edgesight.compression.report import finite
from edgesight.compression.slim import shorten_names
from edgesight.models.dataset import open_dataset
from edgesight.models.detector import OnnxDetector
from edgesight.models.errors import EdgeSightError
from edgesight.models.evaluate import Evaluation, evaluate_detector
from edgesight.models.files import write_json
from edgesight.models.graph import load_model
from edgesight.models.machine import machine
from edgesight.models.spec import ModelSpec

WEIGHTS = {"nanodet_plus_m": "nanodet_plus_m_416.onnx", "yolox_nano": "yolox_nano_416.onnx"}
CORES = ("cortex-a76", "cortex-a72")
REFINE = 1600
FEW = 32


@dataclass(frozen=True)
class Job:
    """What every method is given.

    Attributes:
        path: Float file.
        spec: Of it.
        photos: To calibrate on.
        folder: For files on the way.
    """

    path: Path
    spec: ModelSpec
    photos: Sequence[Path]
    folder: Path

    def feeds(self) -> Iterator[dict[str, Any]]:
        """Yields the prepared photos."""
        name = load_model(self.path).graph.input[0].name
        for tensor in read_photos(self.photos, self.spec):
            yield {name: tensor}


def ours(**settings: Any) -> Callable[[Job], Any]:
    """Returns our method with these settings; what it tried is kept beside the file."""

    def run(job: Job) -> Any:
        config = QuantizeConfig(photos_max=len(job.photos), **settings)
        result = quantize(load_model(job.path), job.spec, job.photos, config)
        shorten_names(result.model)
        name = "_".join(f"{key}={value}" for key, value in settings.items()) or "defaults"
        write_json(job.folder / f"tried_{name}.json", finite(dict(result.report)))
        return result.model

    return run


def onnx_runtime(method: str, photos: int | None = None, **settings: Any) -> Callable[[Job], Any]:
    """Returns ONNX Runtime's static quantization, signed activations and weights.

    Args:
        method: How it calibrates.
        photos: So many at most: but for MinMax it keeps every tensor of every photo in memory.
        settings: Of ``quantize_static``.
    """

    def run(job: Job) -> Any:
        from onnxruntime import quantization as q

        feeds = itertools.islice(job.feeds(), photos)

        class Reader(q.CalibrationDataReader):  # type: ignore[misc]
            def get_next(self) -> dict[str, Any] | None:
                return next(feeds, None)

        ready, result = job.folder / "ready.onnx", job.folder / "peer.onnx"
        q.shape_inference.quant_pre_process(str(job.path), str(ready))
        q.quantize_static(
            str(ready),
            str(result),
            Reader(),
            quant_format=q.QuantFormat.QDQ,
            activation_type=q.QuantType.QInt8,
            weight_type=q.QuantType.QInt8,
            calibrate_method=q.CalibrationMethod[method],
            **settings,
        )
        return load_model(result)

    return run


def nncf(preset: str) -> Callable[[Job], Any]:
    """Returns NNCF's post-training quantization with one of its presets."""

    def run(job: Job) -> Any:
        import nncf as peer

        data = peer.Dataset(list(job.feeds()))
        chosen = peer.QuantizationPreset[preset]
        model = load_model(job.path)
        return peer.quantize(model, data, preset=chosen, subset_size=len(job.photos))

    return run


METHODS: dict[str, Callable[[Job], Any]] = {
    "ours": ours(),
    "ours, at most 0.6 of the cost": ours(cost_max=0.6),
    "ours, at most 0.65 of the cost, up to half in float": ours(
        cost_max=0.65, integer_share_min=0.5, float_parameters_max=0.2
    ),
    "ours, all in integers": ours(integer_share_min=1.0),
    f"ours, refined by {REFINE} photo passes (training)": ours(refine=REFINE),
    "ONNX Runtime, defaults": onnx_runtime("MinMax"),
    "ONNX Runtime, per channel": onnx_runtime("MinMax", per_channel=True),
    f"ONNX Runtime, per channel, 99.99 %, {FEW} photos": onnx_runtime(
        "Percentile", FEW, per_channel=True, extra_options={"CalibPercentile": 99.99}
    ),
    f"ONNX Runtime, per channel, entropy, {FEW} photos": onnx_runtime(
        "Entropy", FEW, per_channel=True
    ),
    "NNCF, performance": nncf("PERFORMANCE"),
    "NNCF, mixed": nncf("MIXED"),
}


def instructions(paths: Sequence[Path]) -> dict[str, list[int | None]]:
    """Returns core -> instructions of each file; None where they cannot be counted."""
    from edgesight.models.cost import Cost, count

    found: dict[str, list[int | None]] = {}
    for core in CORES:
        try:
            costs = count(paths, core)
        except EdgeSightError as error:
            print(f"{core}: {error}", file=sys.stderr)
            found[core] = [None] * len(paths)
            continue
        found[core] = [c.instructions if isinstance(c, Cost) else None for c in costs]
    return found


def row(name: str, job: Job, check: Any, before: Evaluation) -> dict[str, Any]:
    """Quantizes and measures; returns one row of the table."""
    start = time.monotonic()
    try:
        model = METHODS[name](job)
    except Exception as error:  # a peer may raise anything; the others go on
        return {"method": name, "failed": " ".join(str(error).split())[:160]}
    seconds = time.monotonic() - start
    path = job.folder / f"{name}.onnx".replace(" ", "_")
    write_spec(model, job.spec)
    save_model(model, path, job.spec)
    found = evaluate_detector(OnnxDetector(path), check, title=name)
    own, lost = found.interval(), before.minus(found)
    return {
        "method": name,
        "ap": [own.value, own.low, own.high],
        "lost": [lost.value, lost.low, lost.high],
        "photos": len(check),
        "bytes": path.stat().st_size,
        "ms": found.ms_per_photo,
        "seconds": round(seconds, 1),
        "file": path.name,
    }


def as_table(rows: list[dict[str, Any]], known: dict[str, Any]) -> str:
    """Returns the rows as Markdown; instructions and bytes as ratios to the float file."""
    lines = [
        "| method | AP (95 %) | lost (95 %, paired) | bytes | A76 instructions | A72 | seconds |",
        "|---|---|---|---|---|---|---|",
    ]

    def part(value: float | None, whole: float | None) -> str:
        return f"{value / whole:.2f}" if value and whole else "n/a"

    for r in rows:
        if "failed" in r:
            lines.append(f"| {r['method']} | failed: {r['failed']} | | | | | |")
            continue
        costs = [part(r.get(core), known.get(core)) for core in CORES]
        lines.append(
            f"| {r['method']} | {r['ap'][0]:.2f} ({r['ap'][1]:.1f} to {r['ap'][2]:.1f}) "
            f"| {r['lost'][0]:.2f} ({r['lost'][1]:.2f} to {r['lost'][2]:.2f}) "
            f"| {part(r['bytes'], known['bytes'])} | {' | '.join(costs)} | {r['seconds']:.0f} |"
        )
    return "\n".join(lines)


def compare(net: str, options: argparse.Namespace) -> None:
    """Runs all methods on one network and prints its table."""
    data = options.shared / "data"
    folder = options.out / net
    folder.mkdir(parents=True, exist_ok=True)
    source = options.shared / "weights" / WEIGHTS[net]
    spec = OnnxDetector(source).spec
    model, spec = fold_preprocess(tidy(onnx.load(source)), spec)
    path = folder / "float.onnx"
    save_model(model, path, spec)
    unlabelled = [photo.path for photo in open_dataset(data / "unlabelled").photos]
    photos = chosen_photos(unlabelled, options.photos, options.seed)
    job = Job(path, spec, photos, folder)
    check = open_dataset(data / "coco-val").limit(options.photos_max)
    before = evaluate_detector(OnnxDetector(path), check, title="float")
    interval = before.interval()
    store = folder / "rows.json"
    rows = json.loads(store.read_text())["rows"] if store.is_file() else []
    for name in METHODS:
        if any(r["method"] == name for r in rows):
            continue
        if options.only and name not in options.only:
            continue
        rows.append(row(name, job, check, before))
        write_json(store, {"machine": machine(), "rows": rows})
    good = [r for r in rows if "failed" not in r]
    known: dict[str, Any] = {"bytes": path.stat().st_size}
    for core, counts in instructions([path, *(folder / r["file"] for r in good)]).items():
        known[core] = counts[0]
        for r, number in zip(good, counts[1:], strict=True):
            r[core] = number
    known["ap"] = [interval.value, interval.low, interval.high]
    write_json(store, {"machine": machine(), "float": known, "rows": rows})
    costs = ", ".join(f"{c} {known[c] / 1e6:.1f} M" if known[c] else f"{c} n/a" for c in CORES)
    print(
        f"\n{net}, coco-val, {len(check)} photos, {len(photos)} to calibrate on; float: AP "
        f"{interval.value:.2f} ({interval.low:.1f} to {interval.high:.1f}), {costs}\n"
    )
    print(as_table(rows, known))


def main() -> None:
    """Runs the comparison that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--net", choices=sorted(WEIGHTS), nargs="+", default=sorted(WEIGHTS))
    parser.add_argument("--photos", type=int, default=320, help="photos to calibrate on")
    parser.add_argument("--photos-max", type=int, help="photos that AP is measured on")
    rows = "; ".join(METHODS).replace("%", "%%")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        choices=METHODS,
        metavar="ROW",
        help=rows,
    )
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="data and weights")
    parser.add_argument("--out", type=Path, default=Path("runs/compare_int8"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    np.random.seed(options.seed)  # noqa: NPY002  (what the peers draw from)
    for net in options.net:
        compare(net, options)


if __name__ == "__main__":
    main()
