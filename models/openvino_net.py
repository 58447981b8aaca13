"""The same ONNX file in OpenVINO, where that is installed (extra ``openvino``)."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .detections import FloatArray
from .errors import MissingExtraError, ModelFileError
from .files import is_file

PACKAGE = "openvino"
PRECISION = "f32"
"""What OpenVINO computes in where the file says float. Left alone it takes bfloat16 or float16 on
processors that have them, and then does not see what ONNX Runtime sees."""


def has_openvino() -> bool:
    """Returns whether OpenVINO is installed; it is not loaded for that."""
    return importlib.util.find_spec(PACKAGE) is not None


class OpenVinoNet:
    """An ONNX network in OpenVINO on the CPU: the bare network, prepared picture to raw outputs.

    Args:
        path: The ONNX file.
        threads: Threads in all.

    Raises:
        ModelFileError: The file is missing, or OpenVINO cannot read, compile or run it.
        MissingExtraError: OpenVINO is not installed.
    """

    def __init__(self, path: Path | str, *, threads: int = 1) -> None:
        """Compiles the model."""
        self.path = Path(path)
        if not is_file(self.path):
            message = f"{self.path}: expected an ONNX model, found no such file; check the path"
            raise ModelFileError(message)
        try:
            import openvino
        except ImportError as error:
            raise MissingExtraError.of(package=PACKAGE, extra="openvino") from error
        self._lock = threading.Lock()
        settings = {
            "INFERENCE_NUM_THREADS": max(1, threads),
            "INFERENCE_PRECISION_HINT": PRECISION,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
        }
        try:
            model = openvino.Core().compile_model(str(self.path), "CPU", settings)
            self._request: Any = model.create_infer_request()
        except Exception as error:  # it raises RuntimeError for everything; each means no network
            raise self._failed(error, expected="a model that OpenVINO can compile") from error

    def infer(self, tensor: npt.NDArray[Any]) -> list[FloatArray]:
        """Runs the network on one prepared picture.

        Args:
            tensor: As ``OnnxDetector.preprocess`` returns it.

        Returns:
            The raw outputs in the file's order, as ``OnnxDetector.infer`` returns them.

        Raises:
            ModelFileError: It does not run.
        """
        try:
            with self._lock:  # a request runs once at a time
                found: Sequence[Any] = self._request.infer([tensor]).to_tuple()
                return [np.asarray(one) for one in found]
        except Exception as error:
            raise self._failed(error, expected="a model that runs in OpenVINO") from error

    def _failed(self, error: Exception, *, expected: str) -> ModelFileError:
        text = " ".join(str(error).split())[:160]
        return ModelFileError(f"{self.path}: expected {expected}, found: {text}")
