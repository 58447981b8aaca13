"""Several processes train one network: the result of one process with the whole batch."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from edgesight.compression import parallel
from edgesight.compression.export import export_detector
from edgesight.compression.photos import PhotoStream
from edgesight.compression.pipeline import run_recipe
from edgesight.compression.recipe import read_recipe
from edgesight.compression.train import TrainConfig, train
from edgesight.models.errors import RecipeError
from edgesight.models.spec import ModelSpec
from safetensors.torch import load_file

HERE = Path(__file__).parent
kit: Any = SimpleNamespace(**runpy.run_path(str(HERE / "tiny_recipe.py")))


def launch(folder: Path, recipe: Path) -> subprocess.CompletedProcess[str]:
    """Runs ``edgesight compress`` in two processes."""
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    paths = [str(HERE), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, *several, "-m", "edgesight", "compress", str(recipe), "--quiet", "--json"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )


def recipe_in(folder: Path, out: str, batch: int = 4) -> Path:
    distill = kit.DISTILL | {"batch": batch, "rate": 1e-2, "mixed": False, "mosaic": 0.5}
    # the raw maps, the features, the photos' boxes and another teacher's: every term of the loss
    teacher = ["self", str(folder / "other.onnx")]
    steps = [kit.PRUNE, distill | {"teacher": teacher}]
    data = {"photos": "photos", "hold_out": 4, "step_photos": 0}
    values = kit.tiny_recipe(steps, out=out, data=data)
    file = folder / f"{out}.toml"
    file.write_text(kit.as_toml(values))
    return file


def labelled(folder: Path) -> None:
    """Boxes for the drawn photos: something for the labels to say."""
    random = np.random.default_rng(0)
    images, boxes = [], []
    for i, path in enumerate(sorted(folder.glob("*.png")), 1):
        images.append({"id": i, "file_name": path.name, "width": 96, "height": 72})
        for _ in range(i % 3):
            x, y, w, h = (int(v) for v in random.integers(10, 36, 4))
            box = {"id": len(boxes) + 1, "image_id": i, "category_id": 1 + i % 3}
            boxes.append(box | {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0})
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(kit.CLASSES)]
    content = {"images": images, "annotations": boxes, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))
    (folder / "images").mkdir()
    for path in folder.glob("*.png"):
        path.rename(folder / "images" / path.name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    labelled(kit.draw_photos(tmp_path / "photos"))
    tiny = SimpleNamespace(**runpy.run_path(str(HERE / "tiny_net.py")))
    torch.manual_seed(3)
    spec = ModelSpec("yolox", (96, 96), ("c", "b"), resize="stretch")
    export_detector(tiny.make(2), spec, tmp_path / "other.onnx")
    return tmp_path


def weights(out: Path) -> dict[str, torch.Tensor]:
    (file,) = out.glob("steps/2-distill-*/weights.safetensors")
    return load_file(file)


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("one_thread")
def test_two_processes_do_what_one_does(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(HERE)
    alone = run_recipe(read_recipe(recipe_in(folder, "alone")), progress=False, say=print)
    done = launch(folder, recipe_in(folder, "shared"))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)  # one process reports, once
    figures = report["steps"][2]["figures"]
    assert figures["processes"] == 2
    assert figures["photos_labelled"] > 0
    assert alone.rows[2].report is not None
    assert alone.rows[2].report.figures["processes"] == 1
    one, two = weights(folder / "alone"), weights(folder / "shared")
    (before,) = (folder / "alone").glob("steps/1-prune-*/weights.safetensors")
    start = load_file(before)
    moved = {name: float((value - start[name]).abs().max()) for name, value in one.items()}
    assert max(moved.values()) > 1e-2, "it learned"
    for name, value in one.items():
        assert float((value - two[name]).abs().max()) <= 2e-3 * max(moved[name], 1e-3), name


def test_a_batch_that_cannot_be_shared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "count", lambda: 2)
    spec = ModelSpec("yolox", (64, 64), tuple(kit.CLASSES))
    stream = PhotoStream(sorted((folder / "photos" / "images").glob("*.png")), spec, 3)
    net = SimpleNamespace(**runpy.run_path(str(HERE / "tiny_net.py"))).make()
    with pytest.raises(RecipeError, match="a multiple of the 2 processes that share it, found 3"):
        train(net, net, stream, TrainConfig(batch=3), folder / "c.pt", progress=False)
