"""What the tests of the live page share; loaded with runpy, as tests are no package."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
from edgesight.device_app.live import LiveView, RecordingFigures
from edgesight.device_app.model_store import ModelStore, Upload
from edgesight.models.errors import InputError, ModelFileError, OutputError

GUARD_S = 60
GOOD = b"a good model "


def port_of(server: Any) -> int:
    return int(server.url.rsplit(":", 1)[1].strip("/"))


def ask(server: Any, method: str, path: str, body: Any = None, **headers: str) -> Any:
    """Asks once; the answer has ``status``, ``headers``, ``body`` and, if it is some, ``json``."""
    link = http.client.HTTPConnection("127.0.0.1", port_of(server), timeout=GUARD_S)
    data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    link.request(method, path, data, {k.replace("_", "-"): v for k, v in headers.items()})
    answer = link.getresponse()
    raw = answer.read()
    kind = answer.getheader("content-type") or ""
    found = SimpleNamespace(status=answer.status, headers=answer.headers, body=raw, json=None)
    if kind.startswith("application/json") and raw:
        found.json = json.loads(raw)
    link.close()
    return found


def until(condition: Callable[[], Any], what: str = "it never came") -> None:
    deadline = time.monotonic() + GUARD_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def jpeg(shade: int = 90) -> bytes:
    return bytes(cv2.imencode(".jpg", np.full((120, 160, 3), shade, np.uint8))[1].tobytes())


def figures(**more: Any) -> Any:
    """Returns the figures of a run that has everything."""
    return {
        "model": "tiny", "source": "samples", "source_state": "running", "frames": 12,
        "dropped": 4, "capture_fps": 30.0, "inference_fps": 15.5, "display_fps": 14.5,
        "stages_ms": {"inference": {"p50": 20.0, "p90": 22.0, "p99": 30.0}},
        "latency_ms": {"p50": 41.0, "p90": 60.0, "p99": 77.0},
        "accuracy": {
            "kind": "agreement", "text": "agreement with big", "precision": 82.0, "recall": 78.0,
            "f1": 80.0, "f1_low": 70.0, "f1_high": 90.0, "ap50": None, "frames": 12,
            "reference": "big",
        },
        "detections": {"cat": 2, "person": 1}, "elapsed_s": 9.5,
        "board": {
            "cpu_percent": 71.6, "own_cpu_percent": 120.0, "memory_mb": 133.0,
            "memory_free_mb": None, "temperature_c": 64.6, "clock_mhz": 1500.0,
            "clock_max_mhz": 2400.0, "throttled": [], "throttled_before": [], "says": None,
        },
        "classes": ["person", "cat", "dog"], "zones": {"door": {"person": 1}},
        "mqtt": "connected", "warnings": ["cannot write out.jsonl: disk full"], **more,
    }  # fmt: skip


class FakeRecorder:
    """Records the pictures that it is given by hand: a file of JPEGs one after the other."""

    def __init__(self, folder: Path, live: LiveView) -> None:
        self.folder, self.live = folder, live
        self.full = False
        self._name: str | None = None
        self._began = 0.0
        self._error: str | None = None
        self._number = 0

    def start(self) -> str:
        if self._name is None:
            if self.full:
                self._error = "cannot write: disk full; free space"
                raise OutputError(self._error)
            self._number += 1
            self._name, self._began = f"edgesight-2026-{self._number}.mp4", time.monotonic()
            self._error = None
            self.live.events.add("recording", f"began {self._name}")
        return self._name

    def stop(self) -> None:
        name, self._name = self._name, None
        if name is not None:
            (self.folder / name).write_bytes(jpeg() * 20)
            self.live.events.add("recording", f"ended {name}")

    def state(self) -> RecordingFigures:
        on = self._name is not None
        return {
            "on": on, "name": self._name, "pre_roll_s": 5.0, "error": self._error,
            "seconds": round(time.monotonic() - self._began, 1) if on else 0.0,
        }  # fmt: skip

    def list(self) -> Any:
        return [
            {"name": p.name, "bytes": p.stat().st_size, "seconds": 4.5, "time": p.stat().st_mtime}
            for p in sorted(self.folder.iterdir())
            if p.suffix == ".mp4"
        ]

    def open_file(self, name: str) -> Path | None:
        found = {p.name: p for p in self.folder.iterdir() if p.suffix == ".mp4"}
        return found.get(name)

    def delete(self, name: str) -> bool:
        path = self.open_file(name)
        if path is not None:
            path.unlink()
        return path is not None


class FakeModels:
    """The real folder of models without a run: a change is waited for until ``go`` is set."""

    class Busy(InputError):
        pass

    bytes_max = 100_000

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("first.onnx", "second.onnx", "blind.onnx"):
            (folder / name).write_bytes(GOOD * 100)
        self._store = ModelStore(folder / "first.onnx", folder, uploads=True)
        self.go = threading.Event()
        self._current, self._busy = "first.onnx", None
        self._phase, self._error = "", None  # type: tuple[str, str | None]

    def state(self) -> dict[str, Any]:
        models = [
            {"name": name, "bytes": path.stat().st_size, "current": name == self._current}
            for name, path in self._store.files().items()
        ]
        return {
            "current": self._current, "busy": self._busy, "phase": self._phase,
            "error": self._error, "uploads": self._store.uploads, "models": models,
        }  # fmt: skip

    def choose(self, name: str) -> None:
        if name not in self._store.files():
            message = f"expected a model of the list, found {name!r}; see /api/models"
            raise InputError(message)
        if self._busy is not None:
            message = f"expected one model at a time, found that {self._busy} is on its way; wait"
            raise self.Busy(message)
        self._busy, self._phase, self._error = name, "comparing", None  # type: ignore[assignment]
        threading.Thread(target=self._change, args=(name,), daemon=True).start()

    def _change(self, name: str) -> None:
        self.go.wait(GUARD_S)
        if name == "blind.onnx":
            self._error = "blind.onnx: expected to see what the running model sees, found F1 3 %"
        else:
            self._current = name
        self._busy, self._phase = None, ""

    def receive(self, name: str) -> Upload:
        return self._store.receive(name, self._check)

    def _check(self, path: Path) -> None:
        if not path.read_bytes().startswith(GOOD):
            message = f"{path}: expected an ONNX model, found something else; export it again"
            raise ModelFileError(message)

    def names(self) -> Any:
        return sorted(p.name for p in self.folder.iterdir())
