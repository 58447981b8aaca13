"""What tests of the search share: recipes with a target on the tiny detector, labels, processes."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import pytest
import torch
from edgesight.compression.recipe import Recipe, make_recipe
from edgesight.compression.search_command import run_search
from edgesight.models.detector import OnnxDetector

HERE = Path(__file__).parent
ROOT = HERE.parent
tiny: Any = runpy.run_path(str(HERE / "tiny_net.py"))
tools: Any = runpy.run_path(str(HERE / "tiny_recipe.py"))
SEARCH: dict[str, Any] = {
    "passes": 72,
    "input_hw": [[64, 64]],
    "tune_photos": 8,
    "kinds": ["prune", "distill", "quantize"],
}


def tiny_module() -> ModuleType:
    """Returns what a recipe's ``tiny_net:make`` finds."""
    module = ModuleType("tiny_net")
    vars(module).update(tiny)
    return module


@pytest.fixture(scope="module", autouse=True)
def tiny_net() -> Iterator[None]:
    """Lets recipes find ``tiny_net``, computes with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sys.modules["tiny_net"] = tiny_module()
    yield
    del sys.modules["tiny_net"]
    torch.set_num_threads(threads)


def quiet(line: str) -> None:
    """Says nothing."""


def run(recipe: Recipe, **options: Any) -> dict[str, Any]:
    """Runs the search of a recipe without a word."""
    return run_search(recipe, progress=False, say=quiet, **options)


def values_of(out: str = "out", data: dict[str, Any] | None = None, **search: Any) -> Any:
    """Returns a recipe's content with a target."""
    # Costs on x86-64 are multiply-accumulates, with or without an emulator on this machine.
    changes: dict[str, Any] = {"out": out, "search": SEARCH | search, "target": {"core": "x86-64"}}
    if data is not None:
        changes["data"] = data
    return tools["tiny_recipe"]([], **changes)


def recipe_of(base: Path, out: str = "out", **more: Any) -> Recipe:
    """Returns a recipe with a target."""
    values = values_of(out, **more)
    return make_recipe({k: v for k, v in values.items() if k != "steps"}, base)


def write_recipe(file: Path, out: str, **more: Any) -> Path:
    """Writes a recipe with a target."""
    file.write_text(tools["as_toml"](values_of(out, **more)))
    return file


def export_tiny(path: Path) -> Path:
    """Writes the tiny detector as one of our own ONNX files."""
    from edgesight.compression.export import export_detector
    from edgesight.compression.state import describe
    from edgesight.models.nets.common import fold_batchnorm
    from edgesight.models.spec import ModelSpec

    torch.manual_seed(0)
    net = tiny["make"]()
    fold_batchnorm(net)
    spec = ModelSpec("yolox", (64, 64), ("a", "b", "c"), name="tiny")
    export_detector(net.eval(), spec, path, (), describe("tiny", 3, []))
    return path


def label(folder: Path, model: Path, first_id: int = 1) -> Path:
    """Turns a folder of photos into a labelled one: the boxes are those that a model sees."""
    detector = OnnxDetector(model)
    images, annotations = [], []
    for image_id, path in enumerate(sorted(folder.glob("*.png")), first_id):
        image = cv2.imread(str(path))
        height, width = image.shape[:2]
        images.append({"id": image_id, "file_name": path.name, "width": width, "height": height})
        found = detector(image, 0.3, 6)
        for xyxy, kind in zip(found.xyxy.clip(0).tolist(), found.label.tolist(), strict=True):
            x, y, right, bottom = xyxy[0], xyxy[1], min(xyxy[2], width), min(xyxy[3], height)
            if right - x < 1 or bottom - y < 1:
                continue
            box = [x, y, right - x, bottom - y]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": kind + 1,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    kinds = [{"id": i + 1, "name": name} for i, name in enumerate(detector.spec.classes)]
    content = {"images": images, "annotations": annotations, "categories": kinds}
    (folder / "instances.json").write_text(json.dumps(content))
    return folder


def start_process(base: Path, file: Path, package: Path) -> subprocess.Popen[str]:
    """Starts ``edgesight compress`` in a process of its own."""
    if not package.is_dir():
        package.mkdir()
        (package / "edgesight").symlink_to(ROOT)
    env = os.environ | {
        "PYTHONPATH": f"{package}{os.pathsep}{HERE}",
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "edgesight", "compress", str(file), "--quiet", "--json"],
        env=env,
        cwd=base,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
