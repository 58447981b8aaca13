"""The way to an MQTT broker: its address, passwords, certificates, and what is said of them."""

from __future__ import annotations

import logging
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from edgesight.device_app.live import LiveView
from edgesight.device_app.mqtt import MqttLink
from edgesight.device_app.mqtt_broker import Broker as Address
from edgesight.models.errors import InputError, MissingExtraError

kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("mqtt_kit.py"))))
until = kit.until
live, started, linked = kit.live, kit.started, kit.linked  # fixtures
pytestmark = pytest.mark.usefixtures("no_thread_left")


@pytest.mark.parametrize("way", ["url", "file", "environment"])
def test_password(
    started: Any,
    linked: Any,
    way: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    broker = started({"me": "pa ss/@word"})
    wrong = linked(broker, "me:wr0ng@")
    until(lambda: wrong.state == "retrying: the broker refuses user or password (Not authorized)")
    nobody = linked(broker)
    until(lambda: "refuses user or password" in nobody.state)
    more: dict[str, Any] = {}
    if way == "file":
        more["password_file"] = tmp_path / "password"
        more["password_file"].write_text("pa ss/@word\n")
    if way == "environment":
        monkeypatch.setenv("EDGESIGHT_MQTT_PASSWORD", "pa ss/@word")
    link = linked(broker, "me:pa%20ss%2F%40word@" if way == "url" else "me@", **more)
    until(lambda: link.state == "connected")
    for text in (repr(link.broker), repr(wrong.broker), wrong.state, caplog.text):
        assert "pa ss/@word" not in text
        assert "wr0ng" not in text


def test_tls(started: Any, linked: Any, tmp_path: Path) -> None:
    ca, key, certificate = kit.authority(tmp_path, "right", "DNS:localhost")
    other, _, _ = kit.authority(tmp_path, "other", "DNS:localhost")
    broker = started(None, (key, certificate))
    right = linked(broker, scheme="mqtts", ca_file=ca, host="localhost")
    until(lambda: right.state == "connected")
    for more, why in (
        ({"ca_file": other, "host": "localhost"}, ""),
        ({"host": "localhost"}, ""),  # the system's own do not know it
        ({"ca_file": ca}, "IP address mismatch"),
    ):
        link = linked(broker, scheme="mqtts", **more)
        until(lambda link=link: "the broker's certificate is refused" in link.state)
        assert why in link.state
        link.stop()
    plain = linked(broker)
    until(lambda: plain.state == "retrying: the broker closed the connection")


@pytest.mark.parametrize(
    "url",
    [
        "broker",
        "http://s3cret@broker",
        "mqtt://",
        "mqtt://me:s3cret@broker:port",
        "mqtt://me:s3cret@broker:99999",
        "mqtt://me:s3/cret@broker",
        "mqtt://me:12/s3cret@broker",
        "mqtt://me:s3#cret@broker",
        "mqtt://:s3cret@broker",
        "mqtt://me:s3cret@broker/a/+/b",
        "mqtt://me:s3cret@broker/%23",
        "mqtt://me:s3cret@broker/$SYS",
        "mqtt://me:s3cret@broker/a//b",
        "mqtt://me:s3cret@[broker",
        "mqtt://me:s3cret\udcff@broker",
    ],
)
def test_a_bad_address_is_told_without_its_password(url: str) -> None:
    with pytest.raises(InputError, match="expected") as caught:
        MqttLink(url, LiveView())
    assert "s3" not in str(caught.value)


def test_addresses(tmp_path: Path) -> None:
    plain = Address.parse("mqtt://broker", "edgesight/x")
    assert (plain.host, plain.port, plain.tls, plain.prefix) == (
        "broker",
        1883,
        False,
        "edgesight/x",
    )
    full = Address.parse("mqtts://m%40e:p@[::1]:99/a/b%20c/", "x")
    assert (full.host, full.port, full.tls, full.prefix) == ("::1", 99, True, "a/b c")
    assert (full.user, full.password) == ("m@e", "p")
    assert MqttLink("mqtts://broker", LiveView()).broker.port == 8883
    (tmp_path / "empty").touch()
    for more in (
        {"password_file": tmp_path / "none"},
        {"password_file": tmp_path / "empty"},
        {"ca_file": tmp_path / "empty"},
        {"discovery": "a+b"},
    ):
        with pytest.raises(InputError, match="expected"):
            MqttLink("mqtt://me@broker", LiveView(), **more)  # type: ignore[arg-type]
    for name in ("none", "empty"):
        with pytest.raises(InputError, match=f"{name}: expected certificates"):
            MqttLink("mqtts://broker", LiveView(), ca_file=tmp_path / name)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import paho.mqtt.client

    way = r"pip install '\.\[mqtt\]'"
    with monkeypatch.context() as patch:
        patch.delattr(paho.mqtt.client, "CallbackAPIVersion")
        with pytest.raises(MissingExtraError, match=f"found an older one; {way}"):
            MqttLink("mqtt://broker", LiveView())
    monkeypatch.setitem(sys.modules, "paho.mqtt.client", None)
    with pytest.raises(MissingExtraError, match=f"found none; {way}"):
        MqttLink("mqtt://broker", LiveView())
