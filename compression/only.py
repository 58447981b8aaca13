"""Quantization alone: any float ONNX detector and a folder of photos, no recipe."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..models.dataset import Dataset, load_image
from ..models.detector import OnnxDetector
from ..models.errors import InputError, ModelFileError
from ..models.files import sha256
from ..models.graph import load_model
from ..models.machine import machine
from ..models.preprocess import fit, normalise, prepare
from .data import open_photos
from .export import TOLERANCE, set_metadata
from .onnx_io import fold_preprocess, save_model, tidy
from .quantize import QuantizeConfig, quantize
from .report import finite
from .slim import shorten_names
from .state import NET_KEY
from .verify import Subject, verify

CHECK_PHOTOS = 300
"""So many photos are compared at most: enough for an interval of a point or two."""


def quantize_file(
    source: Path,
    photos: Path,
    out: Path,
    target: str = "cortex-a76",
    *,
    head: str | None = None,
    labelled: Path | None = None,
    refine: int = 0,
    cost_max: float | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Turns a float ONNX detector into an INT8 one, and says what that costs and saves.

    Args:
        source: The detector.
        photos: Folder to calibrate on; every tenth photo is kept for comparing, if there are
            enough and ``labelled`` is not given.
        out: File to write.
        target: Core that it is for.
        head: Where the file does not tell.
        labelled: Photos with boxes, for AP before and after.
        refine: Photo passes of training after calibration; 0: none.
        cost_max: At most this part of the float model's instructions, predicted; None: any.
        progress: Show bars.

    Returns:
        JSON-ready; like the report of a recipe with one step.

    Raises:
        RecipeError: A setting is impossible.
        ModelFileError: Not a float detector.
        DatasetError: No photos, or some are damaged.
        OutputError: ``out`` cannot be written.
    """
    if out.resolve() == source.resolve():
        message = f"{out}: expected another file than the model itself, found the same; name one"
        raise InputError(message)
    found = open_photos([photos], labelled)
    spec = OnnxDetector(source, head=head).spec
    model = load_model(source)
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node):
        message = f"{source}: expected a float model, found a quantized one; name the float file"
        raise ModelFileError(message)
    spec = spec.with_changes(name=spec.name or source.stem)
    plain, folded = fold_preprocess(tidy(model), spec)
    set_metadata(plain, NET_KEY, None)
    settings = QuantizeConfig(target=target, refine=refine, cost_max=cost_max)

    def bars(items: Any, **options: Any) -> Any:
        return tqdm(items, disable=not progress, **options)

    result = quantize(plain, folded, found.train_paths, settings, progress=bars)
    shorten_names(result.model)
    with tempfile.TemporaryDirectory(prefix="edgesight-") as folder:
        before, after = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        save_model(plain, before, folded)
        save_model(result.model, after, folded)
        check = found.check if labelled is not None else found.check.limit(CHECK_PHOTOS)
        subject = Subject(before, after, before, core=target)
        figures = verify(subject, check, found.check_kind, progress=progress)
        same = _same_as_source(source, before, head, check)
        figures["passed"] = figures["passed"] and same
        notes = [*result.notes, *figures.pop("notes")]
        if not same:
            notes.insert(0, "with the pre-processing put into the file, it sees something else")
        save_model(result.model, out, folded)
    rows = [("original", "before", []), ("1 quantize", "after", notes)]
    return {
        "model": spec.name,
        "core": target,
        "passed": figures["passed"],
        "steps": [
            {
                "title": title,
                "parameters": figures["size"][key]["parameters"],
                "macs": figures["size"][key]["macs"],
                "bytes": figures["size"][key]["bytes"],
                "score": figures[key],
                "notes": remarks,
                "figures": finite(dict(result.report)) if key == "after" else {},
            }
            for title, key, remarks in rows
        ],
        "verify": figures,
        "files": {"final": {"name": out.name, "bytes": out.stat().st_size, "sha256": sha256(out)}},
        "machine": machine(),
    }


def _same_as_source(source: Path, folded: Path, head: str | None, data: Dataset) -> bool:
    """Says whether the file with pre-processing inside computes what the given file computes."""
    ours, theirs = OnnxDetector(folded), OnnxDetector(source, head=head)
    for photo in data.limit(3).photos:
        image = load_image(photo.path)
        outputs = ours.infer(prepare(image, ours.spec)[0])
        plain = theirs.spec.input_format == "float_nchw"
        fitted = fit(image, theirs.spec)[0]
        wanted = theirs.infer(normalise(fitted, theirs.spec) if plain else fitted[None])
        for a, b in zip(wanted, outputs, strict=True):
            gap = float(np.abs(a - b).max() / max(1.0, float(np.abs(a).max())))
            if not gap <= TOLERANCE:
                return False
    return True
