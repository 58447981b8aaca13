"""``/metrics``: what Prometheus reads, checked with Prometheus's own parser."""

from __future__ import annotations

import http.client
from pathlib import Path
from typing import Any

import pytest
from edgesight.device_app.live import Figures, LiveView
from edgesight.device_app.loop import Loop
from edgesight.device_app.sources import ListSource
from edgesight.device_app.web.metrics import exposition
from edgesight.device_app.web.server import start_server
from edgesight.models.detector import OnnxDetector
from prometheus_client.parser import text_string_to_metric_families

FIGURES: Figures = {
    "model": 'quote " and \\',
    "source": "rtsp://***@camera/1",
    "source_state": "running",
    "frames": 1200,
    "dropped": 34,
    "capture_fps": 30.0,
    "inference_fps": 12.5,
    "stages_ms": {"inference": {"p50": 70.0, "p90": 80.0, "p99": 99.0}},
    "latency_ms": {"p50": 90.0, "p90": 100.0, "p99": 150.0},
    "detections": {"cat": 2, "dog": 1},
    "accuracy": {
        "kind": "agreement",
        "text": "",
        "f1": 81.0,
        "ap50": None,
        "frames": 31,
        "reference": "float",
    },
    "board": {
        "cpu_percent": 71.0,
        "own_cpu_percent": 103.0,
        "memory_mb": 133.0,
        "memory_free_mb": None,
        "temperature_c": 84.5,
        "clock_mhz": 1500.0,
        "clock_max_mhz": 2400.0,
        "throttled": ["under-voltage", "throttled"],
        "throttled_before": [],
        "says": None,
    },
}


def samples(text: bytes) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (s.name, frozenset(s.labels.items())): s.value
        for family in text_string_to_metric_families(text.decode())
        for s in family.samples
    }


def test_every_figure_is_there_in_base_units() -> None:
    found = samples(exposition(FIGURES, 3))

    def value(name: str, **labels: str) -> float:
        return found[f"edgesight_{name}", frozenset(labels.items())]

    assert value("frames_total") == 1200
    assert value("dropped_frames_total") == 34
    assert value("viewers") == 3
    assert value("source_up") == 1
    assert value("frames_per_second", stage="inference") == 12.5
    assert value("stage_seconds", stage="inference", quantile="0.99") == pytest.approx(0.099)
    assert value("latency_seconds", quantile="0.5") == pytest.approx(0.09)
    assert value("detections", label="cat") == 2
    kind = {"kind": "agreement", "reference": "float"}
    assert value("accuracy_ratio", measure="f1", **kind) == pytest.approx(0.81)
    assert value("accuracy_frames", **kind) == 31
    assert value("cpu_usage_ratio") == pytest.approx(0.71)
    assert value("process_resident_memory_bytes") == 133e6
    assert value("temperature_celsius") == 84.5
    assert value("clock_hertz") == 1.5e9
    assert value("throttled", reason="under-voltage") == 1
    models = [dict(labels)["model"] for name, labels in found if name == "edgesight_info"]
    assert models == ['quote " and \\']


def test_what_is_not_known_is_left_out() -> None:
    names = {name for name, _ in samples(exposition(FIGURES, 0))}
    assert "edgesight_memory_available_bytes" not in names
    assert not any(
        dict(labels).get("measure") == "ap50" for _, labels in samples(exposition(FIGURES, 0))
    )
    empty = samples(exposition({}, 0))
    assert empty["edgesight_frames_total", frozenset()] == 0
    lost: Figures = {**FIGURES, "source_state": "retrying: no answer"}
    assert samples(exposition(lost, 0))["edgesight_source_up", frozenset()] == 0


def test_parts_that_only_some_runs_have() -> None:
    recording = {"on": True, "name": "a.mp4", "seconds": 3.0, "pre_roll_s": 5.0, "error": None}
    whole: Any = {
        **FIGURES, "zones": {"door": {"cat": 2, "dog": 0}, "desk": {}}, "recording": recording,
        "mqtt": "retrying: no answer", "warnings": ["one", "two"],
    }  # fmt: skip
    found = samples(exposition(whole, 0, events=17))

    def value(name: str, **labels: str) -> float:
        return found[f"edgesight_{name}", frozenset(labels.items())]

    assert value("zone_objects", zone="door", label="cat") == 2
    assert value("zone_objects", zone="door", label="dog") == 0
    assert value("recording") == 1
    assert value("mqtt_up") == 0
    assert value("warnings") == 2
    assert value("events_total") == 17
    whole |= {"zones": {"door": {}}, "mqtt": "connected", "recording": {**recording, "on": False}}
    again = samples(exposition(whole, 0))
    assert again["edgesight_mqtt_up", frozenset()] == 1
    assert again["edgesight_recording", frozenset()] == 0
    names = {name for name, _ in samples(exposition(FIGURES, 0))}
    assert not names & {"edgesight_recording", "edgesight_mqtt_up", "edgesight_zone_objects"}


def test_a_run_is_collected_over_http(tmp_path: Path) -> None:
    import runpy

    import numpy as np

    kit: Any = runpy.run_path(str(Path(__file__).with_name("app_kit.py")))
    detector = OnnxDetector(kit["build_tiny"](tmp_path / "tiny.onnx"))
    live = LiveView()
    Loop(
        ListSource([np.zeros((64, 64, 3), np.uint8)] * 20), detector, live=live, lossless=True
    ).run()
    server = start_server(live, "127.0.0.1", 0)
    try:
        port = int(server.url.rsplit(":", 1)[1].strip("/"))
        link = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        link.request("GET", "/metrics")
        answer = link.getresponse()
        assert answer.status == 200
        assert (answer.getheader("content-type") or "").startswith("text/plain; version=0.0.4")
        found = samples(answer.read())
    finally:
        server.stop()
    assert found["edgesight_frames_total", frozenset()] == 20
    assert found["edgesight_process_resident_memory_bytes", frozenset()] > 1e6
