"""What the tests of MQTT share: a real mosquitto of their own, and somebody who listens to it."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from edgesight.device_app.live import Figures, LiveView
from edgesight.device_app.mqtt import MqttLink
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion

GUARD_S = 60
PATH = os.environ.get("PATH", "") + ":/usr/sbin"  # where Debian has mosquitto


def figures(detections: dict[str, int] | None = None, **more: Any) -> Figures:
    """Returns what the loop would tell."""
    found: Any = {
        "model": "tiny",
        "source": "samples",
        "source_state": "running",
        "frames": 120,
        "dropped": 3,
        "capture_fps": 30.0,
        "inference_fps": 12.5,
        "stages_ms": {"inference": {"p50": 70.0, "p90": 80.0, "p99": 99.0}},
        "accuracy": {"kind": "agreement", "text": "with float", "f1": 81.0, "frames": 31},
        "detections": {"cat": 2} if detections is None else detections,
        "board": {"temperature_c": 61.5, "throttled": [], "says": None},
        **more,
    }
    return found


def until(condition: Callable[[], Any], what: str = "it") -> Any:
    """Waits for something, and returns it."""
    deadline = time.monotonic() + GUARD_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} never came"
        time.sleep(0.01)
    return found


class Broker:
    """A mosquitto on a free port of this machine; it can die, come back, and stop to answer.

    Args:
        folder: For its files.
        users: Passwords by user; anybody may come without.
        tls: Key and certificate of the broker.
    """

    def __init__(
        self,
        folder: Path,
        users: dict[str, str] | None = None,
        tls: tuple[Path, Path] | None = None,
        *,
        start: bool = True,
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None
        self._users, self._tls = users, tls
        self._log = folder / "mosquitto.log"
        self._config = folder / "mosquitto.conf"
        lines = [
            f"listener {self.port} 127.0.0.1",
            f"user {getpass.getuser()}",  # root would become somebody who may not read the files
            "persistence false",
            "log_dest stderr",
            "log_type all",
            f"allow_anonymous {'false' if users else 'true'}",
        ]
        if users:
            file = folder / "users"
            file.touch(0o600)
            for user, password in users.items():
                subprocess.run(["mosquitto_passwd", "-b", file, user, password], check=True)
            lines.append(f"password_file {file}")
        if tls:
            lines += [f"keyfile {tls[0]}", f"certfile {tls[1]}"]
        self._config.write_text("\n".join(lines) + "\n")
        if start:
            self.start()

    def start(self) -> None:
        program = shutil.which("mosquitto", path=PATH)
        assert program, "expected mosquitto, found none; apt-get install mosquitto"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen([program, "-c", self._config], stderr=log)
        until(self._listens, "mosquitto")

    def _listens(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stall(self) -> None:
        """Connections stay open, and nothing is answered."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)


class Ear:
    """Hears everything that a broker is told; keeps it."""

    def __init__(self, broker: Broker) -> None:
        self.heard: list[tuple[str, bytes, bool]] = []
        self._ready = threading.Event()
        self.client = Client(CallbackAPIVersion.VERSION2)
        self.client.on_connect = lambda client, *_: client.subscribe("#", 1)
        self.client.on_subscribe = lambda *_: self._ready.set()
        self.client.on_message = lambda _client, _data, message: self.heard.append(
            (message.topic, message.payload, message.retain)
        )
        self.client.connect("127.0.0.1", broker.port, 600)
        self.client.loop_start()
        assert self._ready.wait(GUARD_S)

    def told(self, topic: str) -> list[bytes]:
        """Returns what came for a topic, the oldest first."""
        return [payload for where, payload, _ in self.heard if where == topic]

    def last(self, topic: str) -> bytes | None:
        return found[-1] if (found := self.told(topic)) else None

    def json(self, topic: str) -> Any:
        """Returns the newest of a topic; an empty object if there is none."""
        return json.loads(self.last(topic) or b"{}")

    def under(self, prefix: str) -> dict[str, Any]:
        """Returns the newest JSON of each topic that begins so."""
        topics = {where for where, _, _ in self.heard if where.startswith(prefix)}
        return {topic: self.json(topic) for topic in topics}

    def say(self, topic: str, payload: str, retain: bool = False) -> None:
        self.client.publish(topic, payload, 1, retain).wait_for_publish(GUARD_S)

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


def authority(folder: Path, name: str, alternatives: str) -> tuple[Path, Path, Path]:
    """Makes an authority and a broker's certificate.

    Args:
        folder: For the files.
        name: Of the authority.
        alternatives: Names of the broker, as ``DNS:localhost,IP:127.0.0.1``.

    Returns:
        The authority's certificate, the broker's key, the broker's certificate.
    """
    ca_key, ca, key, ask, certificate, names = (
        folder / f"{name}{end}" for end in ("-ca.key", "-ca.pem", ".key", ".csr", ".pem", ".names")
    )
    names.write_text(f"subjectAltName={alternatives}\n")
    new = ["openssl", "req", "-nodes", "-newkey", "rsa:2048"]
    sign = ["openssl", "x509", "-req", "-days", "2", "-CA", ca, "-CAkey", ca_key]
    for command in (
        [*new, "-x509", "-days", "2", "-subj", f"/CN={name}", "-keyout", ca_key, "-out", ca],
        [*new, "-subj", "/CN=broker", "-keyout", key, "-out", ask],
        [*sign, "-CAcreateserial", "-in", ask, "-extfile", names, "-out", certificate],
    ):
        subprocess.run(command, check=True, capture_output=True)
    return ca, key, certificate


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Starts a broker; ends it with the test."""
    brokers = []

    def start(*args: Any, **more: Any) -> Any:
        brokers.append(Broker(tmp_path, *args, **more))
        return brokers[-1]

    yield start
    for broker in brokers:
        broker.kill()


@pytest.fixture
def linked(live: LiveView) -> Iterator[Callable[..., MqttLink]]:
    """Starts a link; stops it with the test."""
    links = []

    def start(broker: Any, user: str = "", scheme: str = "mqtt", **more: Any) -> MqttLink:
        host = more.pop("host", "127.0.0.1")
        url = f"{scheme}://{user}{host}:{broker.port}/cam"
        links.append(MqttLink(url, live, **more))
        links[-1].start()
        return links[-1]

    yield start
    for link in links:
        link.stop()


@pytest.fixture
def live() -> LiveView:
    return LiveView()


@pytest.fixture
def ears() -> Iterator[Callable[[Any], Any]]:
    """Listens to a broker until the end of the test."""
    found = []

    def listen(broker: Any) -> Any:
        found.append(Ear(broker))
        return found[-1]

    yield listen
    for ear in found:
        ear.close()
