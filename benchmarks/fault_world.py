"""Things around a run that can break: a camera, an RTSP server, a broker, a disk, model files."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from edgesight.device_app.sources_photos import SAMPLES, pan_and_zoom
from edgesight.models.dataset import load_image
from edgesight.models.zoo import model_path

CAMERA_FPS = 20
RTSP = Path(__file__).parent.parent / "tests" / "inside" / "rtsp_server.py"
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: what is open ends at once, as with a pulled cable


def free_port() -> int:
    """Returns a port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def reset(link: socket.socket) -> None:
    """Closes a connection without a goodbye."""
    with contextlib.suppress(OSError):
        link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    link.close()


class Camera:
    """A camera on the network, as cheap ones are: 640x480 JPEGs without end over HTTP.

    Attributes:
        mode: ``good``; ``silent``: connected, no bytes; ``garbage``: no JPEGs; ``mixed``: three of
            four are none; ``truncated``: each is cut off; ``small``: 320x240;
            ``refusing``: answers 503.
    """

    def __init__(self, mode: str = "good") -> None:
        """Begins to listen."""
        self.mode = mode
        photo = load_image(min(SAMPLES.glob("*.jpg")))
        frames = [pan_and_zoom(photo, step / 40) for step in range(40)]
        self._jpegs = [cv2.imencode(".jpg", frame)[1].tobytes() for frame in frames]
        half = [cv2.resize(frame, (320, 240)) for frame in frames]
        self._small = [cv2.imencode(".jpg", frame)[1].tobytes() for frame in half]
        self._junk = np.random.default_rng(1).bytes(20_000)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/camera.mjpg"
        self._links: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self.revive()

    def die(self) -> None:
        """Its power is cut: nothing listens, and what was connected is reset."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # or accept() would keep it alive
            listener.close()
        for link in list(self._links):
            with contextlib.suppress(OSError):
                link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                link.shutdown(socket.SHUT_RDWR)

    def revive(self) -> None:
        """It is back at the same address."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def mend(self) -> None:
        """Sends good pictures again."""
        self.mode = "good"

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                link, _ = listener.accept()
                threading.Thread(target=self._serve, args=(link,), daemon=True).start()

    def _serve(self, link: socket.socket) -> None:
        self._links.add(link)
        with contextlib.suppress(OSError), link:
            link.recv(4096)
            if self.mode == "refusing":
                link.sendall(b"HTTP/1.0 503 Busy\r\nContent-Length: 0\r\n\r\n")
                return
            kind = b"multipart/x-mixed-replace; boundary=frame"
            link.sendall(b"HTTP/1.0 200 OK\r\nContent-Type: " + kind + b"\r\n\r\n")
            number = 0
            while self._listener is not None:
                time.sleep(1 / CAMERA_FPS)
                number += 1
                if (data := self._picture(number)) is not None:
                    head = f"Content-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
                    link.sendall(b"--frame\r\n" + head.encode() + data + b"\r\n")
        self._links.discard(link)

    def _picture(self, number: int) -> bytes | None:
        good = self._jpegs[number % len(self._jpegs)]
        if self.mode == "silent":
            return None
        if self.mode == "garbage" or (self.mode == "mixed" and number % 4):
            return self._junk
        if self.mode == "truncated":
            return good[: len(good) // 2]
        return self._small[number % len(self._small)] if self.mode == "small" else good


class Program:
    """A server of somebody else's that can be killed, started again, and stopped for a while."""

    def __init__(self, command: list[str], port: int) -> None:
        """Starts it."""
        self.port, self._command = port, command
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it (again) and waits until it listens."""
        null = subprocess.DEVNULL
        self._process = subprocess.Popen(self._command, stdout=null, stderr=null)
        until_s = time.monotonic() + 20
        while time.monotonic() < until_s:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        message = f"expected {self._command[0]} to listen within 20 s, found that it does not"
        raise RuntimeError(message)

    def kill(self) -> None:
        """Ends it without a goodbye."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stall(self) -> None:
        """Connections stay, and nothing is answered."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """It goes on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)


def broker(folder: Path) -> Program:
    """Returns a mosquitto that is not started yet.

    Raises:
        RuntimeError: There is none.
    """
    program = shutil.which("mosquitto", path=os.environ.get("PATH", "") + ":/usr/sbin")
    if program is None:
        message = "expected mosquitto, found none; apt-get install mosquitto"
        raise RuntimeError(message)
    port, config = free_port(), folder / "broker.conf"
    lines = (f"listener {port} 127.0.0.1", f"user {getpass.getuser()}", "allow_anonymous true")
    config.write_text("\n".join(lines) + "\n")
    return Program([program, "-c", os.fspath(config)], port)


def rtsp_server() -> Program:
    """Returns an RTSP server of Debian's GStreamer that is not started yet."""
    port = free_port()
    return Program(["/usr/bin/python3", os.fspath(RTSP), str(port)], port)


class Disk:
    """A small disk of its own where the system lets us mount one; else a limit on file sizes.

    Attributes:
        folder: Where it is.
        real: Whether it is a disk.
    """

    def __init__(self, megabytes: int) -> None:
        """Mounts it."""
        self.folder = Path(tempfile.mkdtemp(prefix="edgesight-faults-")) / "disk"
        self.folder.mkdir()
        options = ["-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", os.fspath(self.folder)]
        self.real = subprocess.run(["mount", *options], capture_output=True).returncode == 0

    def fill(self, pid: int, leave: int = 0, line_by_line: Path | None = None) -> None:
        """Uses the room up.

        Args:
            pid: Process whose files may not grow where there is no disk of our own.
            leave: Bytes that stay free.
            line_by_line: A file that grows slowly: what is left of its last page, which would
                still take some lines, is filled with a blank one.
        """
        if line_by_line is not None:
            with line_by_line.open("ab") as file:
                file.write(b" " * ((-line_by_line.stat().st_size - 1) % 4096) + b"\n")
        if not self.real:
            import resource

            resource.prlimit(pid, resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
            return
        with (self.folder / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(self.folder).free - leave)
            while not leave:
                file.seek(0, os.SEEK_END)
                file.write(bytes(4096))

    def clear(self, pid: int) -> None:
        """Makes room again."""
        if not self.real:
            import resource

            unlimited = resource.RLIM_INFINITY
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (unlimited, unlimited))
        (self.folder / "filler").unlink(missing_ok=True)

    def close(self) -> None:
        """Takes it away."""
        if self.real:
            subprocess.run(["umount", "-l", os.fspath(self.folder)], check=False)
        shutil.rmtree(self.folder.parent, ignore_errors=True)


@contextlib.contextmanager
def half_requests(port: int, number: int) -> Iterator[int]:
    """So many clients that begin a request and never end it; yields how many got in."""
    with contextlib.ExitStack() as stack:
        there = failed = 0
        while there + failed < number and failed < 5:  # a full queue: no need to knock on
            try:
                link = stack.enter_context(socket.create_connection(("127.0.0.1", port), 0.5))
                link.sendall(b"POST /api/controls HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ")
                there += 1
            except OSError:
                failed += 1
        yield there


def raw(port: int, data: bytes) -> bytes:
    """Sends bytes; returns the first line of the answer, empty if the connection was closed."""
    found = b""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 10) as link:
        link.settimeout(10)
        with contextlib.suppress(OSError):
            link.sendall(data)
        while b"\r\n" not in found and (part := link.recv(4096)):
            found += part
    return found.partition(b"\r\n")[0]


def hanging_model(path: Path) -> Path:
    """Writes the float version of the shipped detector behind a loop without end."""
    from onnx import TensorProto, helper

    number, flag = TensorProto.INT64, TensorProto.BOOL
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["on"]),
            helper.make_node("Identity", ["before"], ["after"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("turn", number, []),
            helper.make_tensor_value_info("go", flag, []),
            helper.make_tensor_value_info("before", TensorProto.FLOAT, [1]),
        ],
        [
            helper.make_tensor_value_info("on", flag, []),
            helper.make_tensor_value_info("after", TensorProto.FLOAT, [1]),
        ],
    )
    loop = helper.make_node("Loop", ["", "yes", "nought"], ["more"], body=body)
    return _with_more(path, [loop], {"yes": np.array(True), "nought": np.zeros(1, np.float32)})


def greedy_model(path: Path) -> Path:
    """Writes the float version of the shipped detector, wanting 40 GB besides."""
    from onnx import helper

    nodes = [
        helper.make_node("Expand", ["nought", "much"], ["memory"]),
        helper.make_node("ReduceSum", ["memory"], ["more"], keepdims=1),
    ]
    much = np.array([10_000_000_000], np.int64)
    return _with_more(path, nodes, {"nought": np.zeros(1, np.float32), "much": much})


def _with_more(path: Path, nodes: list[Any], constants: dict[str, Any]) -> Path:
    """Adds nodes whose result, ``more``, is added to the first output."""
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(os.fspath(model_path("shipped-float")))
    graph = model.graph
    first = graph.output[0].name
    for node in graph.node:
        node.output[:] = ["bare" if name == first else name for name in node.output]
    graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in constants.items())
    graph.node.extend([*nodes, helper.make_node("Add", ["bare", "more"], [first])])
    onnx.save(model, os.fspath(path))
    return path


class Ear:
    """Hears the newest JSON of a topic."""

    def __init__(self, port: int, topic: str) -> None:
        """Begins to listen."""
        from paho.mqtt.client import Client
        from paho.mqtt.enums import CallbackAPIVersion

        self.told: dict[str, Any] = {}
        self._client = Client(CallbackAPIVersion.VERSION2)
        self._client.on_connect = lambda client, *_: client.subscribe(topic, 1)
        self._client.on_message = self._hear
        self._client.connect("127.0.0.1", port, 600)
        self._client.loop_start()

    def _hear(self, _client: Any, _data: Any, message: Any) -> None:
        self.told = json.loads(message.payload)

    def close(self) -> None:
        """Goes."""
        self._client.disconnect()
        self._client.loop_stop()
