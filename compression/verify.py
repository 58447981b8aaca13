"""Before and after on the same photos: the same boxes, accuracy, size, speed, integer share."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..models import core_costs, cost, emulator
from ..models.dataset import Dataset
from ..models.detections import Detections
from ..models.detector import OnnxDetector
from ..models.errors import EdgeSightError, ModelFileError
from ..models.evaluate import Detector, run_detector
from ..models.graph import integer_share, load_model, node_macs, parameters
from .latency import latency, openvino_latency
from .measure import Parity, parity, score

PARITY_PHOTOS = 32
CORES = ("cortex-a76", "cortex-a72", "x86-64")
ARM_MACHINES = ("aarch64", "arm64")


@dataclass(frozen=True)
class Subject:
    """What is compared.

    Attributes:
        original: The detector as it came in, ONNX.
        final: The result, ONNX.
        float_model: The float file that ``final`` was quantized from; None if ``final`` is float.
        torch_side: The same network in torch; None where there is none.
        core: Processor core that the result is for.
    """

    original: Path
    final: Path
    float_model: Path | None = None
    torch_side: Detector | None = None
    core: str = "cortex-a76"


def verify(
    subject: Subject,
    data: Dataset,
    check_kind: str,
    *,
    resamples: int = 1000,
    latency_rounds: int = 60,
    seed: int = 0,
    progress: bool = True,
    train: Dataset | None = None,
) -> dict[str, Any]:
    """Compares a compressed detector with what it was made from.

    Args:
        subject: The files.
        data: Photos to compare on; AP needs labels, without them it is agreement.
        check_kind: Where the photos are from: ``data.PhotoSet.check_kind``.
        resamples: Of the bootstrap.
        latency_rounds: Alternating runs; 0: not timed.
        seed: Of the bootstrap.
        progress: Show bars.
        train: Photos that were learned from, to see whether the result does as well on others.

    Returns:
        JSON-ready figures; ``passed`` says whether the files see what torch sees.

    Raises:
        ModelFileError: A file cannot be used.
        DatasetError: A photo cannot be read, or no class is shared.
    """
    original, final = OnnxDetector(subject.original), OnnxDetector(subject.final)
    few = data.limit(PARITY_PHOTOS)
    pairs: dict[str, Parity] = {}
    float_file = subject.float_model or subject.final
    float_found, _ = run_detector(
        OnnxDetector(float_file), few, progress=progress, score_min=0.05, title="float file"
    )
    if subject.torch_side is not None:
        torch_found, _ = run_detector(
            subject.torch_side, few, progress=progress, score_min=0.05, title="torch"
        )
        pairs["torch and float file"] = parity(torch_found, float_found)
    before, _ = run_detector(original, data, progress=progress, title="before")
    after, _ = run_detector(final, data, progress=progress, title="after")
    classes = final.spec.classes
    result: dict[str, Any] = {
        "photos": len(data),
        "photos_from": check_kind,
        "labels": data.truths is not None,
        "parity": {name: pair.to_json() for name, pair in pairs.items()},
        "before": score(before, before, classes, data, resamples, seed).to_json(),
        "after": score(after, before, classes, data, resamples, seed).to_json(),
        "agreement": _agreement(after, before, data),
        "generalisation": None,
        "size": {
            "before": _size(subject.original),
            "after": _size(subject.final),
            "ratio": subject.final.stat().st_size / subject.original.stat().st_size,
        },
        "integer": _integer(subject.final, subject.core),
        "latency": latency(original, final, data, latency_rounds),
        "openvino": openvino_latency(original, final, data, latency_rounds),
        "cores": costs_by_core(subject, progress=progress),
    }
    if train is not None and (train.truths is None) == (data.truths is None):
        seen = [
            run_detector(one, train, progress=progress, title=f"{title}, training photos")[0]
            for one, title in ((original, "before"), (final, "after"))
        ]
        result["generalisation"] = generalisation(
            [score(one, seen[0], classes, train, resamples, seed).to_json() for one in seen],
            [result["before"], result["after"]],
        )
    result["passed"] = all(pair.same for pair in pairs.values())
    result["notes"] = _notes(result)
    return result


def generalisation(
    train: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Returns accuracy on photos learned from beside accuracy on others, before and after.

    Args:
        train: ``measure.Score`` as JSON of the original and of the result on photos learned from.
        others: The same on photos not learned from.

    Returns:
        JSON-ready; ``gap`` is how many points more a model has on ``train``. AP depends on how many
        photos it is of, so compare gaps, and the gaps of models that met the same photos.
    """
    keys = ("before", "after")
    gaps = [
        None if a["value"] is None or b["value"] is None else a["value"] - b["value"]
        for a, b in zip(train, others, strict=True)
    ]
    return {
        "kind": train[0]["kind"],
        "train": dict(zip(keys, train, strict=True)),
        "others": dict(zip(keys, others, strict=True)),
        "gap": dict(zip(keys, gaps, strict=True)),
    }


def _agreement(
    after: Sequence[Detections], before: Sequence[Detections], data: Dataset
) -> dict[str, Any]:
    plain = Dataset(data.name, data.photos)
    return score(after, before, (), plain).to_json()


def _size(path: Path) -> dict[str, Any]:
    model = load_model(path)
    return {
        "bytes": path.stat().st_size,
        "parameters": parameters(model),
        "macs": sum(node_macs(model).values()),
    }


def _integer(path: Path, core: str) -> dict[str, Any]:
    """Returns which share of the convolution MACs this machine's ONNX Runtime does in integers."""
    with tempfile.TemporaryDirectory(prefix="edgesight-") as folder:
        optimised = Path(folder) / "optimised.onnx"
        OnnxDetector(path, optimized_path=optimised)
        report = integer_share(load_model(path), optimised)
    machine = platform.machine()
    here = (machine in ARM_MACHINES) == core.startswith("cortex")
    note = (
        None
        if here
        else (f"read from ONNX Runtime's graph on {machine}; it makes another one for {core}")
    )
    return {
        "share": report.share,
        "machine": machine,
        "note": note,
        "float_convs": list(report.float_convs)[:20],
        "ops": report.ops,
        "quantized": "QuantizeLinear" in {n.op_type for n in load_model(path).graph.node},
    }


def costs_by_core(subject: Subject, *, progress: bool = True) -> list[dict[str, Any]]:
    """Returns instructions before and after on each known core; n/a with the reason where not.

    They are counted if the emulator and its computer are there already (``edgesight cost
    --setup``): a report downloads nothing.
    """

    def on(core: str) -> dict[str, Any]:
        before = after = reason = None
        if core not in core_costs.CORES:
            reason = "not counted: it is timed where it is at hand"
        else:
            try:
                emulator.find_qemu()
                if emulator.find_guest() is None:
                    reason = "not counted: edgesight cost --setup fetches the emulated computer"
                else:
                    before, after = _counted(subject, core, progress)
            except EdgeSightError as error:
                reason = f"not counted: {error}"
        return {
            "core": core,
            "target": core == subject.core,
            "before": before,
            "instructions": after,
            "ratio": after / before if before and after else None,
            "reason": reason,
        }

    with ThreadPoolExecutor(len(CORES)) as pool:  # an emulator is a process of one thread
        return list(pool.map(on, CORES))


def _counted(subject: Subject, core: str, progress: bool) -> tuple[int, int]:
    first, second = cost.count([subject.original, subject.final], core, runs=1, progress=progress)
    for row in (first, second):
        if isinstance(row, ModelFileError):
            raise row
    assert isinstance(first, cost.Cost)
    assert isinstance(second, cost.Cost)
    return first.instructions, second.instructions


def _notes(result: dict[str, Any]) -> list[str]:
    notes = []
    if result["photos_from"] == "same photos":
        notes.append(
            f"measured on the {result['photos']} photos that it was made with (too few to hold any "
            "out): the figures flatter"
        )
    for name, pair in result["parity"].items():
        if not pair["same"]:
            notes.append(
                f"{name} do not see the same: {pair['lost']} of {pair['boxes']} boxes differ, "
                f"coordinates by up to {pair['box_px']} px, scores by up to {pair['score']}"
            )
    timed = result["latency"]
    if timed is not None and timed["ratio"] > 1:
        notes.append(f"it is slower on this machine ({platform.machine()}), not faster")
    other = result["openvino"]
    if other is not None and other["failed"]:
        notes.append(f"not timed in OpenVINO: {other['failed']}")
    if result["integer"]["quantized"] and result["integer"]["note"]:
        notes.append(f"integer share {result['integer']['note']}")
    for key in ("before", "after"):
        if result[key]["note"] and result[key]["note"] not in notes:
            notes.append(result[key]["note"])
    return notes
