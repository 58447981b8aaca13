"""Runs a model in a process of its own first: a file that crashes the runtime crashes nobody else.

A file from outside may be damaged in ways that no check of its text finds: it may ask for more
memory than there is, hang, or use an instruction that this processor lacks.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from .errors import ModelFileError

TIME_MAX_S = 120.0
"""A large model on a small board is loaded in less."""
MEMORY_MAX = 6 << 30
"""Of addresses, in bytes; ONNX Runtime reserves more than it uses."""
NICENESS = 10
POLL_S = 0.2
TRIED = ("onnxruntime", "openvino")
CPU = "onnxruntime"  # of engines.py, which loads much


def trial_run(
    path: Path,
    *,
    head: str | None = None,
    engine: str = CPU,
    time_max_s: float = TIME_MAX_S,
    stop: threading.Event | None = None,
) -> None:
    """Loads a model and runs it once, elsewhere.

    Args:
        path: The ONNX file.
        head: Where its file does not tell.
        engine: Of ``engines.ENGINES``. One of a graphics card is not tried: it reserves more
            addresses than a trial may have, and the card is the run's; ONNX Runtime stands in.
        time_max_s: Seconds that this may take.
        stop: Ends it at once when set.

    Raises:
        ModelFileError: It cannot be used: what is wrong with it, or how its process ended.
    """
    engine = engine if engine in TRIED else CPU
    command = [sys.executable, "-m", __name__, str(Path(path).absolute()), head or "", engine]
    pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
    try:
        # A session of its own: Ctrl-C is not meant for it.
        child = subprocess.Popen(
            command, stdin=nowhere, stdout=pipe, stderr=nowhere, text=True,
            env=_environment(), start_new_session=True, cwd=os.sep,
        )  # fmt: skip
    except OSError as error:
        message = f"{path}: expected to try it in a process of its own, found: {error}"
        raise ModelFileError(message) from error
    with child:
        try:
            said = _answer(child, time_max_s, stop)
        finally:
            child.kill()
    if said is None:
        message = f"{path}: expected a model that runs, found one that hangs ({time_max_s:.0f} s)"
        raise ModelFileError(message)
    if child.returncode == 0:
        return
    with contextlib.suppress(ValueError, LookupError, TypeError):
        text = json.loads(said.strip().splitlines()[-1])["error"]
        raise ModelFileError(text.replace(str(Path(path).absolute()), os.fspath(path)))
    how = f"exit code {child.returncode}"
    if child.returncode < 0:
        with contextlib.suppress(ValueError):
            how = signal.Signals(-child.returncode).name
    message = f"{path}: expected a model that runs, found one that ends its process ({how})"
    raise ModelFileError(message)


def _answer(
    child: subprocess.Popen[str], time_max_s: float, stop: threading.Event | None
) -> str | None:
    """Returns what a process said until its end; None if it took too long."""
    until = time.monotonic() + time_max_s
    while (left := until - time.monotonic()) > 0 and not (stop is not None and stop.is_set()):
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.communicate(timeout=min(left, POLL_S))[0]
    return None


def _environment() -> dict[str, str]:
    """Returns an environment in which the same package is found."""
    parents = [str(Path(entry).absolute()) for entry in sys.path if entry]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(parents)}


def main(words: list[str]) -> int:
    """Tries the model that the words name; prints one JSON object with what is wrong."""
    path, head, engine = words
    os.nice(NICENESS)
    with contextlib.suppress(OSError):  # if memory is short, rather this process than the loop's
        Path("/proc/self/oom_score_adj").write_text("1000")
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_MAX, MEMORY_MAX))
        signal.alarm(round(TIME_MAX_S) + 10)  # if nobody is left to end it
    import numpy as np

    from .detector import OnnxDetector

    try:
        if _names_other_files(Path(path)):
            message = f"{path}: expected a model in one file, found weights in others; export it so"
            raise ModelFileError(message)
        detector = OnnxDetector(path, head=head or None, engine=engine)
        size = (*detector.spec.input_hw, 3)
        random = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
        for picture in (random, np.full(size, 255, np.uint8)):  # not black alone
            detector(picture)
    except ModelFileError as error:
        print(json.dumps({"error": str(error)}))
        return 2
    except MemoryError:
        print(json.dumps({"error": f"{path}: expected a model that fits into memory"}))
        return 2
    return 0


def _names_other_files(path: Path) -> bool:
    from .external_data import has_external_data

    try:
        data = path.read_bytes()
        return has_external_data(data)
    except ValueError as error:
        message = (
            f"{path}: expected an ONNX model, found {len(data)} bytes that are none ({error}); "
            "copy or export it again"
        )
        raise ModelFileError(message) from error
    except OSError as error:
        message = f"{path}: expected an ONNX model, found none ({error.strerror})"
        raise ModelFileError(message) from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
