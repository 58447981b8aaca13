"""The link to an MQTT broker: against a real mosquitto that dies, stalls and refuses."""

from __future__ import annotations

import gc
import json
import runpy
import signal
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from edgesight.device_app import mqtt
from edgesight.device_app.live import LiveView
from edgesight.device_app.mqtt import MqttLink

kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("mqtt_kit.py"))))
app: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("app_kit.py"))))
figures, until = kit.figures, kit.until
live, started, linked, ears = kit.live, kit.started, kit.linked, kit.ears  # fixtures
pytestmark = pytest.mark.usefixtures("no_thread_left")

CHILD = """
import sys, time
from edgesight.device_app.live import LiveView
from edgesight.device_app.mqtt import MqttLink
MqttLink(sys.argv[1], LiveView()).start()
time.sleep(60)
"""


def test_state_and_events_arrive(started: Any, linked: Any, ears: Any, live: LiveView) -> None:
    broker = started()
    ear = ears(broker)
    live.set_figures(figures(zones={"front door": {"cat": 1}}))
    link = linked(broker, interval_s=3600)
    until(lambda: link.state == "connected")
    state = until(lambda: ear.json("cam/state"))
    assert (state["fps"], state["dropped"], state["temperature_c"]) == (12.5, 3, 61.5)
    assert state["detections"] == {"cat": 2}
    assert list(state["zones"].values()) == [{"objects": 1, "classes": {"cat": 1}}]
    assert (state["accuracy"]["text"], state["accuracy_percent"]) == ("with float", 81.0)
    assert state["problem"] is False

    live.set_figures(figures({"cat": 3, "dog": 1}))  # told although the next is due in an hour
    until(lambda: ear.json("cam/state").get("objects") == 4)
    live.set_figures(figures({"cat": 3, "dog": 1}, source_state="retrying: no camera"))
    until(lambda: ear.json("cam/state")["problem_text"] == "source retrying: no camera")

    live.events.add("source", "lost \ud800")  # as a broken file name in a command line
    live.events.add("sink", "no JSON", number=float("nan"))
    live.events.add("enter", "a cat", zone="a/+#b", label="cat")
    zone = until(lambda: ear.under("cam/zones/a_b_"))
    (topic,) = zone
    assert topic.endswith("/events")
    assert topic.count("/") == 3
    event = zone[topic]
    assert (event["event_type"], event["data"]["label"], event["late"]) == ("enter", "cat", False)
    assert [json.loads(e)["event_type"] for e in ear.told("cam/events")] == ["source"]
    assert link.missed == 1


def test_what_a_newcomer_needs_is_kept(
    started: Any, linked: Any, ears: Any, live: LiveView
) -> None:
    broker = started()
    live.set_figures(figures())
    link = linked(broker, interval_s=3600)
    first = ears(broker)
    live.events.add("source", "lost")
    until(lambda: first.told("cam/events") and first.told("cam/state"))
    late = ears(broker)
    until(lambda: late.told("cam/state") and late.told("cam/availability"))
    assert late.last("cam/availability") == b"online"
    live.events.add("recording", "the end")
    link.stop()
    until(lambda: late.last("cam/availability") == b"offline")
    assert [json.loads(e)["text"] for e in late.told("cam/events")] == ["the end"]  # not kept
    assert link.state == "stopped"
    assert all(retained for topic, _, retained in ears(broker).heard if topic[:3] == "cam")


def test_changes_are_told_at_a_bounded_rate(
    started: Any, linked: Any, ears: Any, live: LiveView
) -> None:
    broker = started()
    ear = ears(broker)
    link = linked(broker, interval_s=3600)
    until(lambda: link.state == "connected")
    began = time.monotonic()
    for i in range(150):
        live.set_figures(figures({"cat": i}))
        time.sleep(0.01)
    until(lambda: ear.json("cam/state").get("objects") == 149)
    assert 2 <= len(ear.told("cam/state")) <= (time.monotonic() - began) / mqtt.GAP_S + 2


def test_the_broker_says_that_we_died(started: Any, ears: Any) -> None:
    broker = started()
    ear = ears(broker)
    with app.process("-c", CHILD, f"mqtt://127.0.0.1:{broker.port}") as child:
        until(lambda: ear.last("edgesight/edgesight/availability") == b"online")
        child.send_signal(signal.SIGKILL)
        until(lambda: ear.last("edgesight/edgesight/availability") == b"offline")


def test_a_false_offline_is_put_right(started: Any, linked: Any, ears: Any) -> None:
    broker = started()
    ear = ears(broker)
    linked(broker)
    until(lambda: ear.last("cam/availability") == b"online")
    ear.say("cam/availability", "offline", retain=True)  # as the will of a run before
    until(lambda: ear.told("cam/availability") == [b"online", b"offline", b"online"])


def test_a_broker_that_comes_dies_and_comes_back(
    started: Any, linked: Any, ears: Any, live: LiveView
) -> None:
    broker = started(start=False)
    live.set_figures(figures())
    link = linked(broker)
    until(lambda: link.state == "retrying: Connection refused")
    broker.start()
    until(lambda: link.state == "connected")
    broker.kill()
    until(lambda: link.state.startswith("retrying"))
    for i in range(mqtt.EVENTS_KEPT + 50):
        live.events.add("source", f"{i}")
    broker.start()
    until(lambda: link.state == "connected")
    ear = ears(broker)
    until(lambda: ear.json("cam/state").get("events_missed") == 50)


def test_a_stalled_broker_holds_up_nobody(
    started: Any, linked: Any, ears: Any, live: LiveView, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mqtt, "LATE_S", -1.0)  # everything is late
    broker = started()
    ear = ears(broker)
    link = linked(broker, keepalive_s=2)
    until(lambda: link.state == "connected")
    broker.stall()
    for i in range(1, 5001):
        live.events.add("source", f"{i} " + 2000 * "x")
    assert len(link._waiting) <= mqtt.EVENTS_KEPT
    until(lambda: link.state == "retrying: the broker does not answer")
    live.events.add("source", "newest")
    broker.resume()
    until(lambda: ear.told("cam/events") and ear.json("cam/events")["text"] == "newest")
    assert link.state == "connected"
    told = {json.loads(event)["number"] for event in ear.told("cam/events")}
    assert ear.json("cam/events")["late"] is True
    assert len(told) <= mqtt.EVENTS_KEPT + mqtt.UNACKNOWLEDGED_MAX
    assert link.missed >= 5001 - len(told) - mqtt.UNACKNOWLEDGED_MAX


def test_what_waits_for_a_stalled_broker_has_an_end(started: Any, live: LiveView) -> None:
    broker = started()
    link = MqttLink(f"mqtt://127.0.0.1:{broker.port}/cam", live)
    link._listener = live.events.listen()
    session = mqtt._Session(link.broker, None, "test", link.topics)
    assert session.connect(60, threading.Event())
    broker.stall()
    sent = 0
    while session.writable:  # until the sockets are full; it must never block
        session.publish("cam/state", 100_000 * "x", qos=0)
        sent += 1
        assert sent < 10_000
    for i in range(100):
        live.set_figures(figures({f"class {i}": i}))
        live.events.add("source", "lost")
        link._tell(session)
    assert len(session._client._out_packet) == 1
    assert not session.unacknowledged
    broker.resume()
    until(lambda: session.turn(0) or session.writable)
    link._tell(session)
    assert len(session.unacknowledged) == mqtt.UNACKNOWLEDGED_MAX
    session.close()
    link._listener.close()


def test_what_the_broker_did_not_acknowledge_is_told_again(
    started: Any, linked: Any, live: LiveView
) -> None:
    broker = started()
    link = linked(broker, keepalive_s=2)
    until(lambda: link.state == "connected")
    broker.stall()
    for i in range(5):
        live.events.add("source", f"{i}")
    until(lambda: link.state.startswith("retrying"))
    until(lambda: [event.text for event, _ in link._waiting] == ["0", "1", "2", "3", "4"])


def test_stop_ends_although_the_broker_is_stalled(started: Any, linked: Any) -> None:
    broker = started()
    link = linked(broker)
    until(lambda: link.state == "connected")
    broker.stall()
    link.stop()
    assert not link._thread.is_alive()
    link.stop()
    assert link.state == "stopped"


@pytest.mark.parametrize("scheme", ["mqtt", "mqtts"])
def test_stop_ends_although_the_broker_never_greets(scheme: str, live: LiveView) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        link = MqttLink(f"{scheme}://127.0.0.1:{silent.getsockname()[1]}", live)
        link.start()
        silent.settimeout(kit.GUARD_S)
        with silent.accept()[0] as connection:
            assert connection.recv(1)
            link.stop()
            # Nothing ends a TLS greeting but its own time: it is not waited for.
            assert link._thread.is_alive() == (scheme == "mqtts")


def test_an_attempt_leaves_nothing_behind(started: Any, live: LiveView) -> None:
    broker = started(start=False)
    link = MqttLink(f"mqtt://127.0.0.1:{broker.port}/cam", live)

    def attempt(working: bool) -> int:
        session = mqtt._Session(link.broker, None, "test", link.topics)
        if working:
            assert session.connect(60, threading.Event())
        else:
            with pytest.raises(ConnectionRefusedError):
                session.connect(60, threading.Event())
        session.close()
        del session
        return len(list(Path("/proc/self/fd").iterdir()))

    gc.collect()
    gc.disable()
    try:
        before = attempt(False)
        assert attempt(False) == before
        broker.start()
        before = attempt(True)
        assert attempt(True) == before
    finally:
        gc.enable()


def test_nothing_comes_in_but_what_we_asked_for(started: Any, linked: Any) -> None:
    broker = started()
    link = linked(broker, discovery="ha")
    asked = [f"{link._client_id} 1 cam/availability"]
    asked += [f"{link._client_id} 0 {prefix}/status" for prefix in ("ha", "homeassistant")]
    until(lambda: all(line in broker.log for line in asked))
    assert broker.log.count("SUBSCRIBE from") == 3
