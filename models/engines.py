"""What runs a network: ONNX Runtime on the CPU or on NVIDIA's, and OpenVINO, where they are there.

An engine that is not installed is not offered; one that is installed is believed only after a real
inference (``OnnxDetector``), because what a package says it can do depends on how it was built, not
on the machine it is on.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt
import onnxruntime as ort

from .detections import FloatArray
from .errors import InputError, ModelFileError
from .files import is_file
from .memory import give_back, shared_arena
from .openvino_net import OpenVinoNet, has_openvino

CPU = "onnxruntime"
"""The engine that is always there, and the one that all others fall back to."""
PROVIDERS: Mapping[str, str] = {
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
"""Engines that are ONNX Runtime on something else than the CPU."""
SHRINK_RUNS = 3
"""Another network that is running can keep one from giving back."""
WEIGHT_ROUNDING = "WeightBiasQuantization"
"""ONNX Runtime's pass that rounds float weights between quantizers, per tensor, unasked: what was
left in float because it has to be would not be."""


class Net(Protocol):
    """A bare network in some engine: a prepared picture in, raw outputs out."""

    def infer(self, tensor: npt.NDArray[Any]) -> list[FloatArray]:
        """Returns the raw outputs for one prepared picture, in the file's order."""


class OrtNet:
    """A network in ONNX Runtime.

    Args:
        path: The ONNX file.
        threads: Threads within one operator.
        spinning: Whether idle threads burn their core waiting for the next picture.
        provider: Where it runs besides the CPU; None: nowhere else.
        optimized_path: Where to save the optimised graph, to be looked at.

    Raises:
        ModelFileError: The file cannot be used.
        InputError: The provider does not start on this machine.
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int = 1,
        spinning: bool = False,
        provider: str | None = None,
        optimized_path: Path | None = None,
    ) -> None:
        """Loads the model."""
        self.path = path
        options = ort.SessionOptions()
        options.intra_op_num_threads = max(1, threads)
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
        if provider is None and shared_arena():
            options.add_session_config_entry("session.use_env_allocators", "1")
        if optimized_path is not None:
            options.optimized_model_filepath = os.fspath(optimized_path)
        wanted = [provider] if provider else []
        if provider == PROVIDERS["tensorrt"]:
            wanted.append(PROVIDERS["cuda"])  # runs what TensorRT has no operator for
        self.session = _open_session(path, options, [*wanted, "CPUExecutionProvider"])
        give_back()
        self._input = self.session.get_inputs()[0].name
        self._options, self._shrink_options = ort.RunOptions(), ort.RunOptions()
        self._shrinking = 0
        with contextlib.suppress(Exception):  # older ones do not know it, and keep what they have
            key = "memory.enable_memory_arena_shrinkage"
            self._shrink_options.add_run_config_entry(key, "cpu:0")
        if provider is not None and self.session.get_providers()[0] != provider:
            message = f"expected {provider}, found that it does not start on this machine"
            raise InputError(message)

    def infer(self, tensor: npt.NDArray[Any]) -> list[FloatArray]:
        """Runs the network on one prepared picture."""
        options, shrinking = self._options, self._shrinking > 0
        if shrinking:
            self._shrinking -= 1
            options = self._shrink_options
        try:
            outputs: list[FloatArray] = self.session.run(None, {self._input: tensor}, options)
        except Exception as error:  # a provider may be there, and have no kernels for this GPU
            message = f"{self.path}: expected a model that runs, found: {one_line(error)}"
            raise ModelFileError(message) from error
        if shrinking:
            give_back()
        return outputs

    def abort(self) -> None:
        """Ends a run that hangs, with an error; and all later ones."""
        self._options.terminate = self._shrink_options.terminate = True

    def shrink(self) -> None:
        """Lets the next runs give back what the shared arena keeps of other, larger networks."""
        self._shrinking = SHRINK_RUNS


def missing(name: str) -> str | None:
    """Returns why an engine is not offered here, in one line; None if it is.

    Raises:
        InputError: There is no engine of that name.
    """
    if name == CPU:
        return None
    if name in PROVIDERS:
        if PROVIDERS[name] in ort.get_available_providers():
            return None
        return f"this onnxruntime was built without {PROVIDERS[name]}; on Jetson take NVIDIA's"
    if name == "openvino":
        return None if has_openvino() else "not installed; pip install '.[openvino]'"
    message = f"engine: expected one of {', '.join(ENGINES)}, found {name!r}"
    raise InputError(message)


def offered() -> list[str]:
    """Returns the engines that are installed, the one that is always there first."""
    return [name for name in ENGINES if missing(name) is None]


def require(name: str) -> None:
    """Raises ``InputError`` if an engine is not installed, or there is none of that name."""
    if (why := missing(name)) is not None:
        message = f"engine {name}: {why}; installed here: {', '.join(offered())}"
        raise InputError(message)


def open_engine(name: str, path: Path, threads: int) -> Net:
    """Loads a network in an engine.

    Args:
        name: Key of ``ENGINES``.
        path: The ONNX file.
        threads: Threads of the network.

    Raises:
        InputError: The engine is not installed, or does not start on this machine.
        ModelFileError: It cannot read or run the file.
    """
    require(name)
    return ENGINES[name](path, threads)


def _on(provider: str) -> Callable[[Path, int], Net]:
    return lambda path, threads: OrtNet(path, threads=threads, provider=provider)


ENGINES: Mapping[str, Callable[[Path, int], Net]] = {
    CPU: lambda path, threads: OrtNet(path, threads=threads),
    **{name: _on(provider) for name, provider in PROVIDERS.items()},
    "openvino": lambda path, threads: OpenVinoNet(path, threads=threads),
}


def _open_session(
    path: Path, options: ort.SessionOptions, providers: list[str]
) -> ort.InferenceSession:
    if not is_file(path):
        message = f"{path}: expected an ONNX model, found no such file; check the path"
        raise ModelFileError(message)
    try:
        return ort.InferenceSession(
            os.fspath(path),
            options,
            providers=providers,
            disabled_optimizers=[WEIGHT_ROUNDING],
            enable_fallback=0,  # or it would go on with the CPU, and say so on standard output
        )
    except Exception as error:  # ONNX Runtime raises many kinds; each means the file is unusable
        size = path.stat().st_size
        message = (
            f"{path}: expected an ONNX model, found {size} bytes that ONNX Runtime cannot load "
            f"({one_line(error)}); copy or export it again"
        )
        raise ModelFileError(message) from error


def one_line(error: Exception) -> str:
    """Returns the beginning of what an error says, without line breaks."""
    return " ".join(str(error).split())[:160]
