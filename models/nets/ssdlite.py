"""SSDLite320 with a MobileNetV3-Large backbone: a thin wrapper around torchvision's network.

torchvision does the building (BSD-3 licence) and, only when asked, the download of its weights;
here are the raw outputs, the layout for export and the default boxes as numbers. The input is RGB,
scaled to 0..1 and then ``(x - 0.5) / 0.5``, resized to 320x320 without letterbox.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torchvision.models.detection import (
    SSDLite320_MobileNet_V3_Large_Weights,
    ssdlite320_mobilenet_v3_large,
)
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList

from ..errors import DownloadError
from .common import DetectorNet

COCO_COLUMNS = 91
"""Score columns for COCO: background, then category ids 1..90, ten of which are unused."""

STRIDES = (16, 32, 64, 128, 256, 512)


def score_columns(num_classes: int) -> int:
    """Return how many score columns the network has for so many classes.

    Args:
        num_classes: Classes to tell apart, without background.

    Returns:
        91 for COCO's 80 classes (the columns are COCO category ids), else ``num_classes + 1``.
    """
    return COCO_COLUMNS if num_classes == 80 else num_classes + 1


def ssdlite_default_boxes(input_hw: tuple[int, int] = (320, 320)) -> npt.NDArray[np.float32]:
    """Return the default boxes (anchors) in the order of :meth:`SSDLite.tail`'s rows.

    Args:
        input_hw: Height and width of the network input, pixels.

    Returns:
        float32 [N, 4]: cx, cy, w, h as fractions of the input; N is 3234 for 320x320. Per level,
        row by row, and six boxes per cell.
    """
    height, width = input_hw
    generator = DefaultBoxGenerator([[2, 3] for _ in STRIDES], min_ratio=0.2, max_ratio=0.95)
    image = ImageList(torch.empty(1, 3, height, width), [(height, width)])
    maps = [torch.empty(1, 1, -(-height // s), -(-width // s)) for s in STRIDES]
    xyxy = generator(image, maps)[0].double().numpy() / (width, height, width, height)
    low, high = xyxy[:, :2], xyxy[:, 2:]
    return np.concatenate([(low + high) / 2, high - low], axis=1).astype(np.float32)


class SSDLite(DetectorNet):
    """torchvision's ``ssdlite320_mobilenet_v3_large`` with raw outputs.

    Args:
        num_classes: Classes to tell apart, without background; 80 means COCO's.
        pretrained: Whether torchvision downloads its COCO weights (only for 80 classes).

    Attributes:
        score_columns: Columns of the scores, the first of them background.

    Raises:
        DownloadError: ``pretrained`` and the download failed.
        ValueError: ``pretrained`` for other than 80 classes.
    """

    spec_head = "ssdlite"
    net_name = "ssdlite320"
    strides = STRIDES

    def __init__(self, num_classes: int = 80, pretrained: bool = False) -> None:
        super().__init__()
        if pretrained and num_classes != 80:
            message = f"expected 80 classes for pretrained weights, found {num_classes}"
            raise ValueError(message)
        self.num_classes = num_classes
        self.score_columns = score_columns(num_classes)
        try:
            whole = ssdlite320_mobilenet_v3_large(
                weights=SSDLite320_MobileNet_V3_Large_Weights.COCO_V1 if pretrained else None,
                weights_backbone=None,
                num_classes=self.score_columns,
                progress=False,
            )
        except (OSError, RuntimeError) as error:
            if not pretrained:
                raise
            message = (
                f"expected torchvision's SSDLite weights, found that the download fails ({error}); "
                "check the network or load a local file"
            )
            raise DownloadError(message) from error
        self.backbone: nn.Module = whole.backbone
        self.head: nn.Module = whole.head
        for module in self.modules():
            if hasattr(module, "inplace"):
                setattr(module, "inplace", False)  # noqa: B010 -- typed as Tensor | Module

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map [B, 3, 320, 320] to twelve maps of raw numbers, finest level first.

        Returns:
            ``[scores_0, boxes_0, scores_1, boxes_1, ...]``: score logits
            [B, 6 * score_columns, H_l, W_l] and box regressions [B, 6 * 4, H_l, W_l], where
            H_l is H / stride rounded up. Channel ``a * score_columns + c`` is column ``c`` of a
            cell's default box ``a``; likewise for boxes.
        """
        features: dict[str, Tensor] = self.backbone(x)
        maps: list[Tensor] = []
        for level, scores, boxes in zip(
            features.values(),
            self._blocks("classification"),
            self._blocks("regression"),
            strict=True,
        ):
            maps += [scores(level), boxes(level)]
        return maps

    def _blocks(self, kind: str) -> list[nn.Module]:
        """Return the prediction block of each level, ``classification`` or ``regression``."""
        return list(self.head.get_submodule(f"{kind}_head.module_list").children())

    def tail(self, levels: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return score logits [B, N, score_columns] and box regressions [B, N, 4].

        No softmax and no decoding: N counts the default boxes in the order of
        :func:`ssdlite_default_boxes`.
        """
        scores = [_rows(level, self.score_columns) for level in levels[0::2]]
        boxes = [_rows(level, 4) for level in levels[1::2]]
        return torch.cat(scores, 1), torch.cat(boxes, 1)


def _rows(level: Tensor, columns: int) -> Tensor:
    """Turn [B, boxes * columns, H, W] into [B, H * W * boxes, columns]."""
    return level.permute(0, 2, 3, 1).reshape(level.shape[0], -1, columns)
