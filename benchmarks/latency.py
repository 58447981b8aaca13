"""How old the picture is that somebody sees, and whether it gets older while the app runs.

    python benchmarks/latency.py --minutes 1 [--source fast|camera|rtsp]

The test pictures carry the millisecond at which they were taken, as bars at their lower edge, and a
viewer reads it back from the JPEG that it was sent: true latency, which shows a buffer that fills
up before the decoder, too (the app's own clock starts when a frame comes out of its source).
``camera`` gives 30 pictures a second, ``fast`` three times what the network manages, both in place
of the source of the real command; ``rtsp`` is H.264 from Debian's GStreamer (packages: faults.py)
on loopback, read by the app's own FFmpeg. Exit code 1 unless

- p99 <= 1.5 frame times + inference + encoding. A frame time is the mean time between two frames
  that went through the network. Inference and encoding are each the p99 of the whole run, as the
  p99 of a sum is held against them: a slow inference is no fault of what is around it; the sum
  with medians is told beside it. Held against it are the app's own latency and, with the cameras,
  the viewer's (with RTSP that has the server's encoder and our decoder in it, and is only told);
- latency grows by less than 1 ms a minute: in runs under 10 minutes, the 95 % interval's lower end;
- 95 of 100 pictures can be read, and SIGTERM ends the run with exit code 0 and a summary.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

SIZE_WH, FPS = (640, 480), 30
KINDS = ("camera", "fast", "rtsp")
START_S, END_S, ANSWER_S = 90.0, 20.0, 5.0
FRAME_TIMES = 1.5
RANKS = {"p50": 0.5, "p99": 0.99}
GROWTH_MAX_MS, LONG_S, WARM_UP_S = 60.0, 600.0, 5.0  # the first: in an hour
TIME_BITS, CHECK_BITS, WHITE, BLACK = 20, 8, 235, 16
CELL, ROWS = 20, 24  # pixels of one bar, and how high all of them are
SYSTEM_PYTHON = "/usr/bin/python3"
PIPELINE = (  # its queue holds one picture
    "( appsrc name=src is-live=true do-timestamp=true format=time max-buffers=1 leaky-type=2 "
    f"caps=video/x-raw,format=I420,width={SIZE_WH[0]},height={SIZE_WH[1]},framerate={FPS}/1 ! "
    "x264enc tune=zerolatency speed-preset=ultrafast key-int-max=15 ! rtph264pay name=pay0 pt=96 )"
)


class Check(NamedTuple):
    """One line of a judgement."""

    name: str
    passed: bool
    found: str
    limit: str


def shown(checks: Sequence[Check]) -> str:
    """Returns a judgement for people."""
    rows = [f"{'ok' if c.passed else 'FAILED':7}{c.name:25}{c.found:42}{c.limit}" for c in checks]
    failed = sum(not c.passed for c in checks)
    return "\n".join([*rows, f"{failed} of {len(checks)} failed" if failed else "all passed"])


class App:
    """The real command, its output in a folder, looked at from outside."""

    def __init__(
        self, folder: Path, words: Sequence[str], program: Sequence[str] = ("-m", "edgesight")
    ) -> None:
        """Starts it."""
        self._out, self._errors = folder / "out.txt", folder / "errors.txt"
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = int(free.getsockname()[1])
        page = ("--port", str(self.port), "--no-browser", "--json")
        with self._out.open("wb") as out, self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, *program, "run", *page, *words],
                stdout=out, stderr=errors, stdin=subprocess.DEVNULL, cwd=folder,
                start_new_session=True,  # Ctrl-C is for us
            )  # fmt: skip

    def ask(self, path: str, method: str = "GET", body: Any = None) -> Any:
        """Asks its page; returns JSON or bytes, None if it does not answer or refuses."""
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, method=method)
        try:
            with urllib.request.urlopen(asked, timeout=ANSWER_S) as answer:
                found = answer.read()
                return json.loads(found) if "json" in answer.headers["content-type"] else found
        except (OSError, ValueError, TypeError, http.client.HTTPException):
            return None

    def metrics(self) -> dict[str, float]:
        """Returns /metrics, its names without ``edgesight_``; empty if it does not answer."""
        lines = (self.ask("/metrics") or b"").decode().splitlines()
        rows = (x.removeprefix("edgesight_").rpartition(" ") for x in lines if x[:1] != "#")
        return {name: float(value) for name, _, value in rows}

    def ready(self) -> None:
        """Waits for its first frames; a RuntimeError if none comes."""
        until_s = time.monotonic() + START_S
        while self.metrics().get("frames_total", 0) < 5:
            if self.process.poll() is not None or time.monotonic() > until_s:
                words = self._errors.read_text(errors="replace").strip()[-500:]
                raise RuntimeError("expected frames, found none: " + words)
            time.sleep(0.1)

    def end(self) -> tuple[Check, dict[str, Any]]:
        """Ends it as systemd does; returns how it went, and its summary."""
        there = self.process.poll() is None
        self.process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(END_S)
        code, told = self.process.poll(), dict[str, Any]()
        errors = self._errors.read_text(errors="replace")
        with suppress(ValueError, IndexError):
            told = json.loads(self._out.read_text().splitlines()[-1])
        strange = re.search(r"Traceback|Exception ignored|terminate called|Segmentation", errors)
        passed = there and code == 0 and bool(told) and strange is None
        found = f"exit code {code}, {told.get('frames', 'no')} frames told"
        found += "" if passed else f"{'' if there else ', gone before'}: {errors.strip()[-200:]}"
        return Check("SIGTERM", passed, found, "exit code 0, a summary"), told

    def close(self) -> None:
        """Ends it in any case."""
        self.process.kill()
        self.process.wait()


class Viewer(threading.Thread):
    """A browser that looks; ``see`` gets each new picture and when it came (monotonic seconds)."""

    def __init__(
        self, port: int, fps: float, see: Callable[[bytes, float], None] = lambda *_: None
    ) -> None:
        """Begins to look."""
        super().__init__(daemon=True)
        self.pictures, self.over = 0, threading.Event()
        self._port, self._fps, self._see = port, fps, see
        self._longest_s, self._last_s = 0.0, time.monotonic()
        self.start()

    def longest_s(self) -> float:
        """Returns the longest time without a new picture since it was asked before."""
        last_s, longest_s, self._longest_s = self._last_s, self._longest_s, 0.0
        return max(longest_s, time.monotonic() - last_s)

    def run(self) -> None:
        """Looks, and comes back if the connection is lost."""
        while not self.over.wait(0.2):
            with suppress(OSError, ValueError, http.client.HTTPException):
                url = f"http://127.0.0.1:{self._port}/stream"
                with urllib.request.urlopen(url, timeout=ANSWER_S) as answer:
                    self._read(answer)

    def _read(self, answer: Any) -> None:
        due_s, before = time.monotonic(), b""
        while not self.over.is_set() and (line := answer.readline()):
            if not line.lower().startswith(b"content-length:"):
                continue
            answer.readline()
            jpeg, now_s = answer.read(int(line.split(b":")[1])), time.monotonic()
            if jpeg != before:
                self._longest_s = max(self._longest_s, now_s - self._last_s)
                self._last_s, before = now_s, jpeg
                self.pictures += 1
                self._see(jpeg, now_s)
            due_s = max(due_s + 1 / self._fps, now_s)
            self.over.wait(due_s - now_s)


def footage(number: int = FPS) -> list[Any]:
    """Returns pictures of the sample photos, 640x480."""
    from edgesight.device_app.sources_photos import SampleFootage

    source = SampleFootage(paced=False)
    return [frame.image for _ in range(number) if (frame := source.read()) is not None]


def bars(time_s: float) -> bytes:
    """Returns one row of pixels that tells a time: white, black, its milliseconds, their check."""
    ms = int(time_s * 1e3) % (1 << TIME_BITS)
    word = ms << CHECK_BITS | zlib.crc32(ms.to_bytes(4, "big")) & 0xFF
    bits = (1, 0, *(word >> i & 1 for i in reversed(range(TIME_BITS + CHECK_BITS))))
    return b"".join(bytes([WHITE if b else BLACK]) * CELL for b in bits).ljust(SIZE_WH[0], b"\x80")


def age_ms(jpeg: bytes, now_s: float) -> float | None:
    """Returns how old a picture is by its bars; None if they cannot be read."""
    import cv2
    import numpy as np

    picture = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_GRAYSCALE)
    assert picture.shape[::-1] == SIZE_WH
    number = 2 + TIME_BITS + CHECK_BITS
    strip = picture[4 - ROWS : -4, : number * CELL].reshape(ROWS - 8, number, CELL)
    levels = np.median(strip[:, :, 5:-5], axis=(0, 2))
    white, black = levels[:2]
    word = int("".join("1" if x > (white + black) / 2 else "0" for x in levels[2:]), 2)
    ms = word >> CHECK_BITS
    wrong = white - black < 80 or zlib.crc32(ms.to_bytes(4, "big")) & 0xFF != word & 0xFF
    return None if wrong else float((now_s * 1e3 - ms) % (1 << TIME_BITS))


def camera(fps: float, words: Sequence[str]) -> int:
    """Runs the real command on a camera that takes a picture each 1/fps and keeps the newest."""
    import numpy as np
    from edgesight.__main__ import main as edgesight
    from edgesight.device_app import open_source
    from edgesight.device_app.sources import BaseSource, Picture

    class Camera(BaseSource):
        live = True

        def __init__(self) -> None:
            super().__init__("camera with a clock", fps)
            self._images = footage()
            self._began_s, self._taken = time.monotonic(), -1

        def _next(self) -> Picture:
            newest = int((time.monotonic() - self._began_s) * fps)
            self._taken = max(self._taken + 1, newest)
            taken_s = self._began_s + self._taken / fps
            self._closing.wait(max(0.0, taken_s - time.monotonic()))
            image = self._images[self._taken % len(self._images)].copy()
            image[-ROWS:] = np.frombuffer(bars(taken_s), np.uint8)[None, :, None]
            return Picture(image, captured_s=taken_s)

    vars(open_source)["open_source"] = lambda *_, **__: Camera()
    return edgesight(list(words))


def rtsp_server(file: str) -> None:
    """Serves the raw pictures of a file with the time on them; runs in Debian's Python."""
    import gi

    gi.require_version("Gst", "1.0")
    gi.require_version("GstRtspServer", "1.0")
    from gi.repository import GLib, Gst, GstRtspServer

    Gst.init(None)
    raw, size = Path(file).read_bytes(), SIZE_WH[0] * SIZE_WH[1]
    upper, whole, began_s = size - SIZE_WH[0] * ROWS, size * 3 // 2, time.monotonic()
    sources: list[Any] = []

    def push() -> None:
        for number in itertools.count():
            time.sleep(max(0.0, began_s + number / FPS - time.monotonic()))
            at = number * whole % len(raw)
            strip = bars(time.monotonic()) * ROWS
            data = raw[at : at + upper] + strip + raw[at + size : at + whole]
            for source in sources[-1:]:
                source.emit("push-buffer", Gst.Buffer.new_wrapped(data))

    server = GstRtspServer.RTSPServer(address="127.0.0.1", service="0")
    factory = GstRtspServer.RTSPMediaFactory(shared=True)
    factory.set_launch(PIPELINE)
    found = lambda media: media.get_element().get_by_name_recurse_up("src")  # noqa: E731
    factory.connect("media-configure", lambda _, media: sources.append(found(media)))
    server.get_mount_points().add_factory("/clock", factory)
    server.attach(None)
    threading.Thread(target=push, daemon=True).start()
    print(f"rtsp://127.0.0.1:{server.get_bound_port()}/clock", flush=True)
    GLib.MainLoop().run()


def serve(folder: Path, stack: ExitStack) -> str:
    """Starts the RTSP server until the stack ends; returns its address."""
    import cv2

    raw = folder / "pictures.i420"
    i420 = (cv2.cvtColor(picture, cv2.COLOR_BGR2YUV_I420) for picture in footage())
    raw.write_bytes(b"".join(picture.tobytes() for picture in i420))
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    words = [SYSTEM_PYTHON, __file__, "rtsp-server", str(raw)]
    running = subprocess.Popen(words, env=clean, start_new_session=True, stdout=subprocess.PIPE)
    stack.callback(running.wait)
    stack.callback(running.kill)
    assert running.stdout is not None
    if not (address := running.stdout.readline().decode().strip()):
        message = f"expected GStreamer in {SYSTEM_PYTHON}, found none; install its packages"
        raise RuntimeError(message)
    return address


def network_fps(model: str) -> float:
    """Returns how many pictures a second the network alone manages."""
    words = [sys.executable, "-m", "edgesight", "bench", model, "--frames", "100", "--json"]
    return float(json.loads(subprocess.check_output(words, stderr=subprocess.DEVNULL))["bare_fps"])


def measure(kind: str, model: str, minutes: float) -> dict[str, Any]:
    """Runs the command on one source with a viewer; returns all that there is to know."""
    from tqdm import tqdm

    seen: list[tuple[float, float | None]] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgesight-latency-")))
        fps = 3 * network_fps(model) if kind == "fast" else FPS
        words = ["--model", model, "--reference", "none", "--threads", "1"]
        program: tuple[str, ...] = (str(Path(__file__).resolve()), "camera", str(fps))
        if kind == "rtsp":
            words += ["--source", serve(folder, stack)]
            program = ("-m", "edgesight")
        app = App(folder, words, program)
        stack.callback(app.close)
        app.ready()
        viewer = Viewer(app.port, 1000, lambda jpeg, at_s: seen.append((at_s, age_ms(jpeg, at_s))))
        stack.callback(viewer.over.set)
        with suppress(KeyboardInterrupt):
            for _ in tqdm(range(math.ceil(60 * minutes)), desc=kind, unit="s"):
                time.sleep(1)
                if app.process.poll() is not None:
                    break
        viewer.over.set()
        viewer.join(ANSWER_S)
        found = dict(zip(("ended", "told"), app.end(), strict=True))
    return {"kind": kind, "source_fps": round(fps, 1), "seen": seen, **found}


def judge(found: dict[str, Any]) -> tuple[list[Check], dict[str, Any]]:
    """Returns what a run says, and its figures in milliseconds; see the top of this file."""
    from soak import grows, slope  # which imports this file for what looks

    told, seen = found["told"], found["seen"]
    read = [(s, ms) for s, ms in seen if ms is not None and s >= seen[0][0] + WARM_UP_S]
    if len(read) < 100 or not told:
        return [Check("pictures", False, f"{len(read)} read", "100 or more"), found["ended"]], {}
    times_s, ages = (list(column) for column in zip(*read, strict=True))
    rank, frame_ms = sorted(ages), 1e3 / told["fps"]
    figures = {key: told["stages"][key] for key in ("inference", "encode")}
    middle, limit = (
        FRAME_TIMES * frame_ms + sum(figures[key][p] for key in ("inference", "encode"))
        for p in ("p50", "p99")
    )
    figures["app's own"] = told["latency"]
    figures["glass to viewer"] = {p: rank[int(len(rank) * n)] for p, n in RANKS.items()}
    long = (lasted_s := times_s[-1] - times_s[0]) >= LONG_S
    growth = slope(times_s, ages, min(60.0, lasted_s / 24), steps=not long)
    few = not grows(growth, GROWTH_MAX_MS, long=long)
    share = sum(ms is not None for _, ms in seen) / len(seen)
    checks = [
        Check("latency grows, ms/hour", few, str(growth), f"under {GROWTH_MAX_MS:g}"),
        Check("pictures read", share >= 0.95, f"{share:.1%} of {len(seen)}", "95 %"),
        found["ended"],
    ]
    for key in ("app's own", "glass to viewer"):
        p50, p99 = (figures[key][p] for p in RANKS)
        held = key == "app's own" or found["kind"] != "rtsp"
        said = f"{limit:.1f} ({middle:.1f} with medians)" if held else "only told"
        late = f"p50 {p50:.1f}, p99 {p99:.1f} ms"
        checks.append(Check(key, not held or p99 <= limit, late, said))
    return checks, {**figures, "frame_time": frame_ms, "limit": limit}


def main() -> int:
    """Prints a table for each source; returns 1 if something failed."""
    if sys.argv[1:2] == ["camera"]:
        return camera(float(sys.argv[2]), sys.argv[3:])
    if sys.argv[1:2] == ["rtsp-server"]:
        rtsp_server(sys.argv[2])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=1.0, help="of each source")
    parser.add_argument("--source", choices=KINDS, help="default: all, one after another")
    parser.add_argument("--model", default="shipped")
    parser.add_argument("--out", type=Path, help="JSON with every picture's age")
    args = parser.parse_args()
    if not 0 < args.minutes < math.inf:
        parser.error("expected --minutes above 0; give another number")
    from edgesight.models.machine import machine

    result: dict[str, Any] = {"machine": machine(), "runs": {}}
    passed = True
    for kind in (args.source,) if args.source else KINDS:
        found = measure(kind, args.model, args.minutes)
        told, figures = judge(found)
        passed &= all(check.passed for check in told)
        print(f"{kind}, {found['source_fps']:g} FPS\n{shown(told)}", flush=True)
        result["runs"][kind] = {"checks": told, "figures": figures, "seen": found["seen"]}
    if args.out:
        args.out.write_text(json.dumps(result) + "\n")
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
