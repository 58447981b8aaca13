"""The figures of a run in Prometheus's text format, for ``/metrics``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ... import __version__
from ..live import Figures

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
QUANTILES = {"p50": "0.5", "p90": "0.9", "p99": "0.99"}
ACCURACY = ("precision", "recall", "f1", "f1_low", "f1_high", "ap50")
BOARD = (
    ("cpu_percent", "cpu_usage_ratio", 0.01, "Of all cores together, 0..1"),
    ("own_cpu_percent", "process_cpu_cores", 0.01, "Cores that EdgeSight uses"),
    ("memory_mb", "process_resident_memory_bytes", 1e6, "Resident memory of EdgeSight"),
    ("memory_free_mb", "memory_available_bytes", 1e6, "Memory that is left"),
    ("temperature_c", "temperature_celsius", 1.0, "Of the processor"),
    ("clock_mhz", "clock_hertz", 1e6, "Of the fastest core"),
)
"""Key of the board's figures, metric without prefix, its unit in that of the key, what it is."""


class RunCollector(Collector):
    """Turns figures into metrics.

    Args:
        figures: As the loop publishes them.
        viewers: Browsers that look.
        events: What happened in the run so far.
    """

    def __init__(self, figures: Figures, viewers: int, events: int = 0) -> None:
        """Keeps the figures."""
        self._figures: dict[str, Any] = dict(figures)
        self._viewers, self._events = viewers, events

    def collect(self) -> Iterable[Metric]:
        """Yields the metrics; what is not known is left out."""
        f = self._figures
        told = {"model": f.get("model", ""), "source": f.get("source", ""), "version": __version__}
        yield _gauge("info", "What runs", [(told, 1)])
        up = f.get("source_state", "running") == "running"
        yield _gauge("source_up", "Whether the source gives frames", [({}, int(up))])
        yield _gauge("viewers", "Browsers that look", [({}, self._viewers)])
        for key, name, what in (
            ("frames", "frames", "Frames that went through the detector"),
            ("dropped", "dropped_frames", "Frames that were replaced by newer ones unseen"),
        ):
            counter = CounterMetricFamily(f"edgesight_{name}", what)
            counter.add_metric([], f.get(key, 0))
            yield counter
        happened = CounterMetricFamily("edgesight_events", "What happened: /api/events")
        happened.add_metric([], self._events)
        yield happened
        rates = ("capture", "inference", "display")
        yield _gauge(
            "frames_per_second",
            "Of the latest seconds",
            [({"stage": s}, f[f"{s}_fps"]) for s in rates if f"{s}_fps" in f],
        )
        yield _gauge(
            "stage_seconds",
            "Time per frame of the latest frames",
            [
                ({"stage": stage, "quantile": q}, values[p] / 1e3)
                for stage, values in f.get("stages_ms", {}).items()
                for p, q in QUANTILES.items()
            ],
        )
        latency = f.get("latency_ms", {})
        yield _gauge(
            "latency_seconds",
            "From capture to the encoded picture",
            [({"quantile": q}, latency[p] / 1e3) for p, q in QUANTILES.items() if p in latency],
        )
        counts = f.get("detections", {})
        yield _gauge(
            "detections",
            "Boxes on the newest frame",
            [({"label": k}, n) for k, n in counts.items()],
        )
        yield from self._accuracy()
        yield from self._parts()
        yield from self._board()

    def _accuracy(self) -> Iterable[Metric]:
        found = self._figures.get("accuracy", {})
        labels = {"kind": found.get("kind", "none"), "reference": found.get("reference") or ""}
        yield _gauge(
            "accuracy_ratio",
            "Against the source's labels, or agreement with a reference, 0..1",
            [
                ({**labels, "measure": name}, found[name] / 100)
                for name in ACCURACY
                if isinstance(found.get(name), (int, float))
            ],
        )
        yield _gauge("accuracy_frames", "Frames behind it", [(labels, found.get("frames", 0))])

    def _parts(self) -> Iterable[Metric]:
        """Yields what only some runs have."""
        f = self._figures
        if "zones" in f:
            yield _gauge(
                "zone_objects",
                "Objects inside a zone",
                [
                    ({"zone": zone, "label": label}, n)
                    for zone, counts in f["zones"].items()
                    for label, n in counts.items()
                ],
            )
        if "recording" in f:
            yield _gauge("recording", "Whether it records", [({}, int(f["recording"]["on"]))])
        if "mqtt" in f:
            yield _gauge("mqtt_up", "Whether a broker listens", [({}, f["mqtt"] == "connected")])
        if "warnings" in f:
            yield _gauge("warnings", "What does not work", [({}, len(f["warnings"]))])

    def _board(self) -> Iterable[Metric]:
        board = self._figures.get("board")
        if board is None:
            return
        for key, name, unit, what in BOARD:
            if board[key] is not None:
                yield _gauge(name, what, [({}, board[key] * unit)])
        yield _gauge(
            "throttled",
            "What holds the board back now",
            [({"reason": reason}, 1) for reason in board["throttled"]],
        )


def _gauge(name: str, what: str, rows: list[tuple[dict[str, str], float]]) -> GaugeMetricFamily:
    keys = list(rows[0][0]) if rows else []
    family = GaugeMetricFamily(f"edgesight_{name}", what, labels=keys)
    for labels, value in rows:
        family.add_metric([labels[key] for key in keys], value)
    return family


def exposition(figures: Figures, viewers: int, events: int = 0) -> bytes:
    """Returns what ``/metrics`` answers."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(RunCollector(figures, viewers, events))
    return generate_latest(registry)
