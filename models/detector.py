"""The detector that everything uses: evaluation, calibration, the camera app and the gate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .boxes import nms_per_class
from .detections import Detections, FloatArray
from .engines import CPU, Net, OrtNet, one_line, open_engine, require
from .errors import EdgeSightError, ModelFileError
from .heads import HEADS
from .preprocess import Image, Placement, prepare
from .recognise import check_raw, read_spec
from .spec import ModelSpec

SCORE_MIN_EVAL = 0.05
"""Floor for accuracy on a live picture; `evaluate.SCORE_MIN_AP` is the one for published AP."""


class OnnxDetector:
    """A detector from an ONNX file, in ONNX Runtime on the CPU unless another engine is asked for.

    Calling it walks the whole image road; the three stages can be called one by one to time them.
    Another engine is used only if it runs the network here and gives outputs of the same shapes;
    else ONNX Runtime stays, and ``engine_note`` says why.

    Args:
        path: The ONNX file.
        head: Only for foreign files whose head cannot be recognised: a key of ``heads.HEADS``.
        threads: Threads within one operator.
        spinning: Whether idle threads burn their core waiting for the next frame. Off by default:
            on a board with a camera they would burn it between frames.
        optimized_path: Where to save ONNX Runtime's optimised graph, to be looked at.
        engine: Key of ``engines.ENGINES``.

    Attributes:
        engine: The engine that runs it.
        engine_note: Why that is not the one that was asked for; None if it is.

    Raises:
        ModelFileError: The file is missing, not ONNX, damaged, or fits no head.
        InputError: The engine is not installed.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        head: str | None = None,
        threads: int = 1,
        spinning: bool = False,
        optimized_path: Path | None = None,
        engine: str = CPU,
    ) -> None:
        """Loads the model and runs it once."""
        self.path = Path(path)
        require(engine)
        net = OrtNet(self.path, threads=threads, spinning=spinning, optimized_path=optimized_path)
        self._net: Net = net
        self.engine = CPU
        self.engine_note: str | None = None
        inputs = {i.name: _shape(i.shape) for i in net.session.get_inputs()}
        outputs = {o.name: _shape(o.shape) for o in net.session.get_outputs()}
        metadata = net.session.get_modelmeta().custom_metadata_map
        try:
            self.spec: ModelSpec = read_spec(inputs, outputs, metadata, head)
        except ModelFileError as error:
            message = f"{self.path}: {error}"
            raise ModelFileError(message) from None
        self._check_input(next(iter(inputs.values())), net.session.get_inputs()[0].type)
        # The first run allocates and, on some boards, compiles: nobody should time it.
        try:
            tensor, placement = self.preprocess(np.zeros((*self.spec.input_hw, 3), np.uint8))
            raw = self.infer(tensor)
            self.postprocess(raw, placement)
        except ModelFileError:
            raise
        except Exception as error:
            message = f"{self.path}: expected a model that runs, found: {one_line(error)}"
            raise ModelFileError(message) from error
        try:
            check_raw(self.spec, raw)
        except ModelFileError as error:
            message = f"{self.path}: {error}"
            raise ModelFileError(message) from None
        if engine != CPU:
            self._move_to(engine, threads, tensor, raw)

    def preprocess(self, image: Image) -> tuple[npt.NDArray[Any], Placement]:
        """Returns the network's input for a BGR picture, and where the picture lies in it."""
        return prepare(image, self.spec)

    def infer(self, tensor: npt.NDArray[Any]) -> list[FloatArray]:
        """Runs the network on one prepared picture and returns its raw outputs."""
        return self._net.infer(tensor)

    def postprocess(
        self,
        outputs: Sequence[FloatArray],
        placement: Placement,
        score_min: float = SCORE_MIN_EVAL,
        limit: int = 100,
    ) -> Detections:
        """Returns at most ``limit`` detections in source pixels, best first."""
        return decode(outputs, self.spec, placement, score_min, limit)

    def __call__(
        self,
        image: Image,
        score_min: float = SCORE_MIN_EVAL,
        limit: int = 100,
        seen_from_wh: tuple[int, int] | None = None,
    ) -> Detections:
        """Detects in one BGR picture, uint8 ``(height, width, 3)``.

        Args:
            image: The picture.
            score_min: Weaker boxes are left out.
            limit: Boxes at most, best first.
            seen_from_wh: Size of another picture of the same view, in whose pixels the boxes are
                to be; the picture's own by default.
        """
        tensor, placement = self.preprocess(image)
        if seen_from_wh is not None:
            placement = placement.seen_from(seen_from_wh)
        return self.postprocess(self.infer(tensor), placement, score_min, limit)

    def abort(self) -> None:
        """Ends an inference that hangs, with an error, where the engine can do that."""
        if isinstance(self._net, OrtNet):
            self._net.abort()

    def shrink(self) -> None:
        """Lets its next inferences give back memory that larger models have left behind."""
        if isinstance(self._net, OrtNet):
            self._net.shrink()

    def _move_to(
        self, engine: str, threads: int, tensor: npt.NDArray[Any], raw: list[FloatArray]
    ) -> None:
        """Lets another engine run the network, if it can."""
        try:
            net = open_engine(engine, self.path, threads)
            shapes = [out.shape for out in net.infer(tensor)]
        except EdgeSightError as error:
            self.engine_note = f"{engine} does not run it: {str(error).split(';')[0]}"
            return
        if shapes != [out.shape for out in raw]:
            self.engine_note = f"{engine} does not run it: its outputs have other shapes, {shapes}"
            return
        self._net, self.engine = net, engine

    def _check_input(self, shape: tuple[int, ...], kind: str) -> None:
        height, width = self.spec.input_hw
        wanted = {
            "float_nchw": ((1, 3, height, width), "tensor(float)"),
            "uint8_nhwc": ((1, height, width, 3), "tensor(uint8)"),
        }[self.spec.input_format]
        fits = len(shape) == 4 and all(s in (0, w) for s, w in zip(shape, wanted[0], strict=True))
        if not fits or kind != wanted[1]:
            message = (
                f"{self.path}: expected input {list(wanted[0])} {wanted[1]}, "
                f"found {list(shape)} {kind}; export the model again"
            )
            raise ModelFileError(message)


def decode(
    outputs: Sequence[FloatArray],
    spec: ModelSpec,
    placement: Placement,
    score_min: float = SCORE_MIN_EVAL,
    limit: int = 100,
) -> Detections:
    """Returns detections from raw outputs: head decoder, NMS per class, back to source pixels."""
    xyxy, score, label = HEADS[spec.head].decode(outputs, spec, score_min)
    # A diverged network must not stop the loop.
    finite = np.isfinite(xyxy).all(axis=1) & np.isfinite(score)
    if not finite.all():
        xyxy, score, label = xyxy[finite], score[finite], label[finite]
    kept = nms_per_class(xyxy, score, label, spec.nms_iou, limit)
    return Detections(placement.to_source(xyxy[kept]), score[kept], label[kept])


def _shape(shape: Sequence[int | str | None]) -> tuple[int, ...]:
    return tuple(s if isinstance(s, int) else 0 for s in shape)
