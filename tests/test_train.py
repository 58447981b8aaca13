"""The training loop: it learns, resumes to the bit, and refuses what it cannot go on from."""

from __future__ import annotations

import copy
import itertools
import runpy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from edgesight.compression import train as train_module
from edgesight.compression.augment import augment
from edgesight.compression.photos import PhotoStream, calibration_batches
from edgesight.compression.sparse import mark_sparse
from edgesight.compression.train import TrainConfig, train
from edgesight.models.errors import ModelFileError, RecipeError
from edgesight.models.nets.common import DetectorNet
from edgesight.models.spec import ModelSpec

kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("prune_kit.py"))))
pytestmark = pytest.mark.usefixtures("one_thread")
SPEC = ModelSpec(
    "yolox", (64, 64), ("a", "b"), mean=(114.0,) * 3, std=(60.0,) * 3, resize="stretch"
)
CONFIG = TrainConfig(photos=48, batch=4, rate=1e-2, save_s=1e9, mixed=False)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for i in range(10):
        coarse = random.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{i}.png"), cv2.resize(coarse, (80, 60)))
    return sorted(folder.glob("*.png"))


def student() -> DetectorNet:
    """The teacher with noise on its weights."""
    net: DetectorNet = kit.folded()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.3 * p.std() * torch.randn(p.shape, generator=generator)
    return net


def stream(paths: list[Path], config: TrainConfig = CONFIG) -> PhotoStream:
    return PhotoStream(paths, SPEC, config.batch, config.seed)


class Interrupted(PhotoStream):
    """Ends like Ctrl-C after so many batches."""

    stop_after = 5

    def batches(self, first: int, stop: int) -> Iterator[Any]:
        yield from itertools.islice(super().batches(first, stop), self.stop_after)
        raise KeyboardInterrupt


def weights(net: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def test_it_learns(paths: list[Path], tmp_path: Path) -> None:
    teacher, net = kit.folded(), student()
    config = replace(CONFIG, photos=240, rate=2e-2)
    batch = calibration_batches(paths, SPEC, 8)[0]

    def error(net: DetectorNet) -> float:
        with torch.no_grad():
            pairs = zip(net(batch), teacher(batch), strict=True)
            return sum(float((a - b).square().mean()) for a, b in pairs)

    before = error(net)
    frozen = weights(teacher)
    averaged = train(net, teacher, stream(paths, config), config, tmp_path / "c.pt", progress=False)
    assert error(net) < 0.3 * before
    assert error(averaged) < 0.3 * before
    assert all(torch.equal(a, b) for a, b in zip(frozen, weights(teacher), strict=True))
    assert not averaged.training


def test_resumed_equals_uninterrupted_to_the_bit(paths: list[Path], tmp_path: Path) -> None:
    teacher = kit.folded()
    whole = train(student(), teacher, stream(paths), CONFIG, tmp_path / "whole.pt", progress=False)
    broken = Interrupted(paths, SPEC, CONFIG.batch, CONFIG.seed)
    with pytest.raises(KeyboardInterrupt):
        train(student(), teacher, broken, CONFIG, tmp_path / "part.pt", progress=False)
    saved = torch.load(tmp_path / "part.pt", weights_only=True)
    assert saved["step"] == 5
    resumed = train(student(), teacher, stream(paths), CONFIG, tmp_path / "part.pt", progress=False)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))
    start = copy.deepcopy(student())
    assert not all(torch.equal(a, b) for a, b in zip(weights(whole), weights(start), strict=True))


def test_a_finished_run_is_not_run_again(paths: list[Path], tmp_path: Path) -> None:
    config = replace(CONFIG, photos=8)
    first = train(student(), kit.folded(), stream(paths), config, tmp_path / "c.pt", progress=False)
    idle = stream(paths)
    idle.make = None  # a batch that was made all the same would raise
    again = train(student(), kit.folded(), idle, config, tmp_path / "c.pt", progress=False)
    assert all(torch.equal(a, b) for a, b in zip(weights(first), weights(again), strict=True))


def test_a_checkpoint_of_other_photos_is_refused(paths: list[Path], tmp_path: Path) -> None:
    config = replace(CONFIG, photos=4)
    train(student(), kit.folded(), stream(paths), config, tmp_path / "c.pt", progress=False)
    with pytest.raises(ModelFileError, match="found another's; remove it"):
        train(student(), kit.folded(), stream(paths[:-1]), config, tmp_path / "c.pt")


@pytest.mark.parametrize("width", [16, 24])
def test_a_checkpoint_of_another_run_is_refused(
    width: int, paths: list[Path], tmp_path: Path
) -> None:
    config = replace(CONFIG, photos=4)
    train(student(), kit.folded(), stream(paths), config, tmp_path / "c.pt", progress=False)
    before = (tmp_path / "c.pt").read_bytes()
    other = config if width == 24 else replace(config, rate=1e-3)
    with pytest.raises(ModelFileError, match="found another's; remove it"):
        train(
            kit.folded(width), kit.folded(width), stream(paths), other, tmp_path / "c.pt",
            progress=False,
        )  # fmt: skip
    assert (tmp_path / "c.pt").read_bytes() == before


@pytest.mark.parametrize("damage", ["empty", "text", "truncated"])
def test_a_corrupt_checkpoint_is_one_clear_line(
    damage: str, paths: list[Path], tmp_path: Path
) -> None:
    file = tmp_path / "c.pt"
    train(student(), kit.folded(), stream(paths), replace(CONFIG, photos=4), file, progress=False)
    data = file.read_bytes()
    file.write_bytes({"empty": b"", "text": b"no", "truncated": data[: len(data) // 2]}[damage])
    with pytest.raises(ModelFileError, match="cannot be read; remove it") as caught:
        train(student(), kit.folded(), stream(paths), CONFIG, file, progress=False)
    assert "\n" not in str(caught.value)


def test_a_loss_that_is_no_number(paths: list[Path], tmp_path: Path) -> None:
    net = student()
    with torch.no_grad():
        net.stem.weight[0] = float("nan")  # type: ignore[union-attr,index,operator]
    with pytest.raises(RecipeError, match="expected a finite loss, found nan; lower the rate"):
        train(net, kit.folded(), stream(paths), CONFIG, tmp_path / "c.pt", progress=False)
    assert not (tmp_path / "c.pt").exists()


class Sick(PhotoStream):
    """From the fourth batch on its pictures are no numbers."""

    def make(self, step: int) -> Any:
        batch = super().make(step)
        return replace(batch, images=batch.images * float("nan")) if step >= 3 else batch


def test_the_checkpoint_before_a_broken_step_stays(paths: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "c.pt"
    sick = Sick(paths, SPEC, CONFIG.batch, CONFIG.seed)
    config = replace(CONFIG, save_s=0.0)  # after each step
    with pytest.raises(RecipeError, match="expected a finite loss, found nan; lower the rate"):
        train(student(), kit.folded(), sick, config, file, progress=False)
    saved = torch.load(file, weights_only=True)
    assert saved["step"] == 3
    assert all(torch.isfinite(p).all() for p in saved["net"].values())
    healed = train(student(), kit.folded(), stream(paths), config, file, progress=False)
    whole = train(student(), kit.folded(), stream(paths), CONFIG, tmp_path / "w.pt", progress=False)
    assert all(torch.equal(a, b) for a, b in zip(weights(healed), weights(whole), strict=True))


def test_a_step_that_spoils_the_weights_is_not_stored(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_later(net: Any, part: float) -> None:
        if part >= 3 / 12:  # the loss is still sound then, what is learned from it is not
            net.stem.weight.register_hook(lambda gradient: gradient * float("nan"))

    monkeypatch.setattr(train_module, "before_step", break_later)
    file = tmp_path / "c.pt"
    with pytest.raises(RecipeError, match="expected a finite weight, found nan; lower the rate"):
        train(student(), kit.folded(), stream(paths), CONFIG, file, progress=False)
    assert not file.exists()
    config = replace(CONFIG, save_s=0.0)
    with pytest.raises(RecipeError, match="expected a finite weight, found nan; lower the rate"):
        train(student(), kit.folded(), stream(paths), config, file, progress=False)
    saved = torch.load(file, weights_only=True)
    assert saved["step"] == 3
    assert all(torch.isfinite(p).all() for p in saved["net"].values())


def test_zeros_of_a_sparse_student_stay(paths: list[Path], tmp_path: Path) -> None:
    for marked in (True, False):
        net = student()
        with torch.no_grad():
            net.stem.weight[:, 1] = 0  # type: ignore[union-attr,index,operator]
        if marked:
            mark_sparse(net)
        trained = train(
            net, kit.folded(), stream(paths), CONFIG, tmp_path / f"{marked}.pt", progress=False
        )
        assert bool((trained.stem.weight[:, 1] == 0).all()) == marked  # type: ignore[union-attr,index,operator]


def test_what_changes_in_the_course_of_a_run(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told before each step how much is done, by the step's number alone: also when resumed."""
    parts: list[float] = []
    monkeypatch.setattr(train_module, "before_step", lambda net, part: parts.append(part))
    broken = Interrupted(paths, SPEC, CONFIG.batch, CONFIG.seed)
    with pytest.raises(KeyboardInterrupt):
        train(student(), kit.folded(), broken, CONFIG, tmp_path / "c.pt", progress=False)
    train(student(), kit.folded(), stream(paths), CONFIG, tmp_path / "c.pt", progress=False)
    assert parts == [step / 12 for step in range(12)]


def test_a_gpu_that_is_not_there(paths: list[Path], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    config = replace(CONFIG, device="cuda")
    with pytest.raises(RecipeError, match="expected a GPU that torch can use, found none"):
        train(student(), kit.folded(), stream(paths), config, tmp_path / "c.pt", progress=False)


def test_batches_depend_only_on_seed_and_step(paths: list[Path]) -> None:
    one, two = stream(paths), stream(paths)
    wanted = [one.make(step).images for step in range(6)]
    assert torch.equal(two.make(4).images, wanted[4])
    made_ahead = list(two.batches(2, 6))
    assert len(made_ahead) == 4
    for batch, images in zip(made_ahead, wanted[2:], strict=True):
        assert torch.equal(batch.images, images)
    other = PhotoStream(paths, SPEC, CONFIG.batch, seed=1)
    assert not torch.equal(other.make(0).images, wanted[0])
    assert not torch.equal(wanted[0], wanted[1])
    assert wanted[0].shape == (4, 3, 64, 64)
    assert wanted[0].dtype == torch.float32


def test_every_photo_comes_once_per_pass(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []

    def load(path: Path) -> np.ndarray:
        seen.append(path)
        return np.zeros((32, 32, 3), np.uint8)

    monkeypatch.setattr("edgesight.compression.photos.load_image", load)
    stream(paths).make(0)
    for step in range(1, 5):
        stream(paths).make(step)
    assert sorted(seen[:10]) == sorted(seen[10:]) == paths
    assert seen[:10] != seen[10:]


def test_a_photo_that_cannot_be_read_ends_the_run(paths: list[Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no photo")
    with pytest.raises(Exception, match=r"bad.jpg"):
        list(stream([bad] * 4).batches(0, 2))


@pytest.mark.parametrize("wh", [(640, 48), (33, 500), (9, 9), (1, 1)])
def test_augmented_pictures_are_pictures(wh: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (wh[1], wh[0], 3), dtype=np.uint8)
    kept = image.copy()
    changed = 0
    for seed in range(40):
        out, matrix = augment(image, np.random.default_rng(seed), SPEC)
        again, _ = augment(image, np.random.default_rng(seed), SPEC)
        assert out.dtype == np.uint8
        assert out.ndim == 3
        assert out.shape[2] == 3
        assert 1 <= max(out.shape) <= max(1.5 * 64 + 8, *wh)
        assert np.array_equal(out, again)
        assert matrix.shape == (2, 3)
        changed += out.shape != image.shape or not np.array_equal(out, image)
    assert changed > 10
    assert np.array_equal(image, kept), "the source was written to"


def test_another_checkpoint_interval_goes_on_with_the_same_run(
    paths: list[Path], tmp_path: Path
) -> None:
    broken = Interrupted(paths, SPEC, CONFIG.batch, CONFIG.seed)
    with pytest.raises(KeyboardInterrupt):
        train(student(), kit.folded(), broken, CONFIG, tmp_path / "c.pt", progress=False)
    other = replace(CONFIG, save_s=1.0)
    train(student(), kit.folded(), stream(paths), other, tmp_path / "c.pt", progress=False)
    faster = replace(CONFIG, rate=2e-2)
    with pytest.raises(ModelFileError, match="found another's"):
        train(student(), kit.folded(), stream(paths), faster, tmp_path / "c.pt", progress=False)
