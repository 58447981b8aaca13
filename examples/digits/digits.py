"""The classic small classifier, before and after: pictures, two trained networks, a count of hits.

``python digits.py`` writes into ``runs/digits``: scikit-learn's handwritten digits as pictures of
28x28 pixels (a folder to learn from, one to measure on), and two trained networks as ONNX files,
``big.onnx`` and ``small.onnx``. ``python digits.py MODEL ...`` counts how many of the pictures to
measure on each model names rightly.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from edgesight.compression.onnx_io import save_model
from edgesight.models.dataset import open_dataset
from edgesight.models.detector import OnnxDetector
from edgesight.models.spec import ModelSpec
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

FOLDER = Path("runs/digits")
SIDE_PX = 28
TEST = 600
BATCH = 32
NETS = {"big": (32, 64, 256, 14), "small": (16, 32, 64, 8)}
"""Channels of the two convolutions, width of the first linear layer, epochs of training."""
SPEC = ModelSpec(
    head="classify",
    input_hw=(SIDE_PX, SIDE_PX),
    classes=tuple("0123456789"),
    color="rgb",
    std=(255.0, 255.0, 255.0),
    resize="stretch",
    pad_value=0,
    strides=(8192,),
)
"""What the networks are fed: written into the ONNX files, so that nobody has to ask again."""


class Classic(nn.Module):
    """The network of every tutorial: two convolutions of 5x5, two linear layers.

    Args:
        first: Channels of the first convolution.
        second: Channels of the second one.
        hidden: Width of the first linear layer.
    """

    def __init__(self, first: int, second: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, first, 5)
        self.conv2 = nn.Conv2d(first, second, 5)
        self.fc1 = nn.Linear(second * 4 * 4, hidden)
        self.fc2 = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Maps pictures (b, 3, 28, 28), values 0..1, to one logit per digit (b, 10)."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc2(x)


def pictures() -> tuple[np.ndarray, np.ndarray]:
    """Returns the digits as uint8 (n, 28, 28, 3), and which digit each one is."""
    digits = load_digits()  # 8x8, values 0..16
    grey = np.clip(digits.images * 255 / 16, 0, 255).astype(np.uint8)
    large = [cv2.resize(g, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_LINEAR) for g in grey]
    return np.repeat(np.stack(large)[..., None], 3, axis=3), digits.target


def write_photos(folder: Path, images: np.ndarray, labels: np.ndarray, first: int) -> None:
    """Writes pictures and COCO labels: each digit's box is the whole picture."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    photos, boxes = [], []
    for number, (image, label) in enumerate(zip(images, labels, strict=True), first):
        name = f"{number:04}.png"
        cv2.imwrite(str(folder / "images" / name), image)
        size = {"width": SIDE_PX, "height": SIDE_PX}
        photos.append({"id": number, "file_name": name, **size})
        box = {"bbox": [0, 0, SIDE_PX, SIDE_PX], "area": SIDE_PX**2, "iscrowd": 0}
        boxes.append({"id": number, "image_id": number, "category_id": int(label), **box})
    names = [{"id": i, "name": name} for i, name in enumerate(SPEC.classes)]
    content = {"images": photos, "annotations": boxes, "categories": names}
    (folder / "instances.json").write_text(json.dumps(content))


def trained(net: nn.Module, images: np.ndarray, labels: np.ndarray, epochs: int) -> nn.Module:
    """Trains a network the usual way."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    y = torch.from_numpy(labels)
    optimizer = torch.optim.Adam(net.parameters())
    steps = epochs * math.ceil(len(x) / BATCH)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(net(x[index]), y[index]).backward()
            optimizer.step()
            rate.step()
    return net.eval()


def save(net: nn.Module, path: Path) -> None:
    """Writes a network as an ONNX file that says what it is to be fed."""
    example = torch.zeros(1, 3, SIDE_PX, SIDE_PX)
    program = torch.onnx.export(net, (example,), dynamo=True, verbose=False)
    save_model(program.model_proto, path, SPEC.with_changes(name=path.stem))


def hits(model: Path, folder: Path) -> tuple[int, int]:
    """Returns how many pictures of a labelled folder a model names rightly, and of how many."""
    detector, data = OnnxDetector(model), open_dataset(folder)
    right = 0
    names, truths = data.labels()
    for photo, truth in zip(data.photos, truths, strict=True):
        found = detector(cv2.imread(str(photo.path)), score_min=0.0)
        right += detector.spec.classes[found.label[0]] == names[truth.label[0]]
    return right, len(data)


def main(models: list[str]) -> None:
    """Counts hits of the models named; without any, makes pictures and networks first."""
    if not models:
        torch.manual_seed(0)
        images, labels = pictures()
        parts = train_test_split(images, labels, test_size=TEST, stratify=labels, random_state=0)
        write_photos(FOLDER / "learn", parts[0], parts[2], 1)
        write_photos(FOLDER / "test", parts[1], parts[3], 1 + len(parts[0]))
        for name, (*widths, epochs) in NETS.items():
            save(trained(Classic(*widths), parts[0], parts[2], epochs), FOLDER / f"{name}.onnx")
        models = [str(FOLDER / "big.onnx"), str(FOLDER / "small.onnx")]
    for model in models:
        right, count = hits(Path(model), FOLDER / "test")
        size = Path(model).stat().st_size
        print(f"{model}: {right} of {count} right ({100 * right / count:.1f} %), {size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
