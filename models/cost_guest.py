"""What the emulated computer of ``cost`` does after its kernel has started; its ``/init``.

It counts how long ONNX Runtime takes for each ``/models/*.onnx``: the emulator lets guest time go
on by one nanosecond per instruction. Every finding is one line on the console: ``MARK``, a tab,
JSON. It is only ever run inside the guest, with the guest's own Python, and imports nothing of
EdgeSight.
"""

import contextlib
import ctypes
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

MARK = "EDGESIGHT"
REBOOT_POWER_OFF = 0x4321FEDC
SEED = 0


def main() -> None:
    """Mounts, counts, tells, and turns the computer off."""
    libc = ctypes.CDLL(None)
    try:
        for kind, place in (("proc", "/proc"), ("devtmpfs", "/dev"), ("sysfs", "/sys")):
            Path(place).mkdir(exist_ok=True)
            libc.mount(kind.encode(), place.encode(), kind.encode(), 0, None)
        Path("/tmp").mkdir(exist_ok=True)
        os.chdir("/tmp")
        sys.path.insert(0, "/opt/site")
        import onnxruntime

        flags = [
            line for line in Path("/proc/cpuinfo").read_text().splitlines() if "Features" in line
        ]
        dot = any("asimddp" in line for line in flags)
        tell({"start": onnxruntime.__version__, "dot_product": dot})
        asked = json.loads(Path("/models/asked.json").read_text())
        for number in asked["numbers"]:
            tell({"begin": number})
            try:
                tell({"done": number, **count(onnxruntime, number, asked["runs"], asked["layers"])})
            except Exception as error:
                tell({"failed": number, "why": " ".join(str(error).split())[:300]})
    except BaseException as error:
        tell({"fatal": repr(error)})
    finally:
        libc.sync()
        libc.reboot(REBOOT_POWER_OFF)


def tell(found: dict[str, Any]) -> None:
    """Writes one line for the computer outside."""
    print(f"{MARK}\t{json.dumps(found, separators=(',', ':'))}", flush=True)


def count(runtime: Any, number: int, runs: int, layers: bool) -> dict[str, Any]:
    """Returns instructions of each run, whether all outputs are finite, and those of each node."""
    import numpy as np

    path = f"/models/{number}.onnx"
    session = open_session(runtime, path, profile=False)
    tensors = {entry.name: example(entry) for entry in session.get_inputs()}
    took, outputs = [], []
    for _ in range(runs + 1):  # the first run allocates
        start = time.perf_counter_ns()
        outputs = session.run(None, tensors)
        took.append(time.perf_counter_ns() - start)
    numbers = (np.asarray(output) for output in outputs)
    finite = all(bool(np.isfinite(n).all()) for n in numbers if n.dtype.kind == "f")
    found: dict[str, Any] = {"runs": took[1:], "finite": finite}
    del session
    if layers:
        session = open_session(runtime, path, profile=True)
        for _ in range(runs + 1):
            session.run(None, tensors)
        found["nodes"] = nodes(Path(session.end_profiling()))
    return found


def open_session(runtime: Any, path: str, *, profile: bool) -> Any:
    """Returns a session of one thread."""
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.enable_profiling = profile
    return runtime.InferenceSession(
        path,
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=["WeightBiasQuantization"],  # as models.detector does
    )


def example(entry: Any) -> Any:
    """Returns a random tensor for an input; only the batch may be free, and is 1.

    Raises:
        ValueError: Another size is free, or the kind of number is unknown.
    """
    import numpy as np

    shape = [
        1 if at == 0 and not isinstance(size, int) else size for at, size in enumerate(entry.shape)
    ]
    if not all(isinstance(size, int) for size in shape):
        message = (
            f"expected an input of fixed size, found {entry.name} {entry.shape}; export it with one"
        )
        raise ValueError(message)
    numbers = np.random.default_rng(SEED).random(shape) * 255
    kinds = {
        **{"float": np.float32, "float16": np.float16, "double": np.float64, "uint8": np.uint8},
        **{"int8": np.int8, "int32": np.int32, "int64": np.int64, "bool": np.bool_},
    }
    kind = entry.type.removeprefix("tensor(").removesuffix(")")
    if kind not in kinds:
        message = f"expected an input of numbers, found {entry.name} of {entry.type}"
        raise ValueError(message)
    return (numbers / 2 if kind == "int8" else numbers).astype(kinds[kind])


def nodes(profile: Path) -> list[list[Any]]:
    """Returns name, operator, output shapes and instructions (median) of each node, in order."""
    found: dict[str, list[Any]] = {}
    for event in json.loads(profile.read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"].removesuffix("_kernel_time")
            shapes = [s for o in event["args"].get("output_type_shape", []) for s in o.values()]
            entry = found.setdefault(name, [name, event["args"]["op_name"], shapes, []])
            entry[3].append(1000 * event["dur"])  # microseconds
    with contextlib.suppress(OSError):
        profile.unlink()
    for entry in found.values():
        times = sorted(entry[3][1:])
        entry[3] = times[len(times) // 2]
    return list(found.values())


if __name__ == "__main__":
    main()
