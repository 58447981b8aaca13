"""What goes out over MQTT: the state as JSON, and the messages by which Home Assistant finds it.

Formats as Home Assistant documents them: www.home-assistant.io/integrations/mqtt/ (discovery, its
status topic) and .../integrations/{sensor,binary_sensor,event}.mqtt/. There is one retained
message for each entity, and not one for the whole device (since 2024.11): a class that an earlier
run saw keeps its sensor although nobody here remembers it, and older versions understand it, too.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from .. import __version__
from .events import Event
from .live import AccuracyFigures, Figures

ZONE_KINDS = ("enter", "leave")
KINDS = ("source", "model", "recording", "sink")
OTHER = "other"
"""Event type of a kind that Home Assistant was not told of: it refuses unknown ones."""
LATE_S = 10.0
"""An event that waited so long for the broker is told, but sets nothing off in Home Assistant."""
STATE_MAX = 255
"""Characters of a state that Home Assistant takes."""

Message = tuple[str, str]
"""A topic and its payload."""


def slug(text: str) -> str:
    """Returns a text as one level of a topic, and as an id: letters, digits, ``_`` and ``-``.

    What had to be changed gets a few digits of its hash, so that ``a/b`` and ``a b`` stay two.
    """
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", text)[:64]
    if plain == text and plain:
        return plain
    return f"{plain.strip('_')}_{hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()[:6]}"


def literal(text: str) -> str:
    """Returns a text as a string in a template, with nothing in it that could end or be code.

    Names come with models and options; Home Assistant would run what is in its templates.
    """
    return "'" + "".join(c if c.isascii() and c.isalnum() else _escaped(c) for c in text) + "'"


def to_json(value: Any) -> str:
    """Returns a value as JSON that every reader takes, in ASCII: any text can be sent like this.

    Raises:
        ValueError: There is a number in it that JSON does not have (NaN, infinity).
    """
    return json.dumps(value, allow_nan=False, default=str)


def problem_of(figures: Figures) -> str | None:
    """Returns in one line what is wrong with the run; None if nothing is."""
    wrong = []
    state = figures.get("source_state", "running")
    if state not in ("running", "ended"):
        wrong.append(f"source {state}")
    board = figures.get("board")
    if board is not None and board["throttled"]:
        wrong.append(board["says"] or ", ".join(board["throttled"]))
    wrong += figures.get("warnings", [])
    return "; ".join(wrong) or None


def state_of(figures: Figures, events_missed: int = 0) -> dict[str, Any]:
    """Returns what the state topic holds, JSON-ready.

    Args:
        figures: As the loop publishes them, not empty.
        events_missed: Events that were thrown away while the broker was not there.
    """
    board, stages = figures.get("board"), figures.get("stages_ms", {})
    accuracy = figures.get("accuracy", {})
    detections = figures.get("detections", {})
    problem = problem_of(figures)
    return {
        "model": figures.get("model", "")[:STATE_MAX],
        "source": figures.get("source"),
        "source_state": figures.get("source_state", "")[:STATE_MAX],
        "fps": figures.get("inference_fps"),
        "capture_fps": figures.get("capture_fps"),
        "inference_ms": stages["inference"]["p50"] if "inference" in stages else None,
        "frames": figures.get("frames"),
        "dropped": figures.get("dropped"),
        "elapsed_s": figures.get("elapsed_s"),
        "accuracy": accuracy,
        "accuracy_percent": _percent(accuracy),
        "temperature_c": board["temperature_c"] if board else None,
        "throttled": board["throttled"] if board else [],
        "problem": problem is not None,
        "problem_text": problem,
        "objects": sum(detections.values()),
        "detections": detections,
        "zones": {
            zone: {"objects": sum(counts.values()), "classes": counts}
            for zone, counts in figures.get("zones", {}).items()
        },
        "recording": figures.get("recording"),
        "events_missed": events_missed,
    }


@dataclass(frozen=True)
class Topics:
    """Where everything goes.

    Attributes:
        prefix: Of the topics, without a slash at its end.
        name: For people.
        discovery: Prefix that Home Assistant listens to.
    """

    prefix: str
    name: str
    discovery: str

    @property
    def availability(self) -> str:
        """``online`` or ``offline``; retained."""
        return f"{self.prefix}/availability"

    @property
    def state(self) -> str:
        """The state as JSON; retained."""
        return f"{self.prefix}/state"

    def event(self, event: Event, late: bool) -> Message:
        """Returns an event as a message: a zone's under the zone's topic, others under ``events``.

        Raises:
            ValueError: It cannot be told as JSON.
        """
        zone = event.data.get("zone")
        if zone is not None and event.kind in ZONE_KINDS:
            topic, kind = self._of_zone(str(zone)), event.kind
        else:
            topic, kind = f"{self.prefix}/events", event.kind if event.kind in KINDS else OTHER
        return topic, to_json({"event_type": kind, **event.to_dict(), "late": late})

    def _of_zone(self, zone: str) -> str:
        return f"{self.prefix}/zones/{slug(zone)}/events"

    def device(self) -> list[Message]:
        """Returns the discovery of everything that is always there."""
        measured = {"state_class": "measurement"}
        diagnostic = {"entity_category": "diagnostic"}
        attributes = {"json_attributes_topic": self.state}
        accuracy = {"json_attributes_template": "{{ value_json.accuracy | tojson }}", **attributes}
        text = {
            "json_attributes_template": "{{ {'text': value_json.problem_text} | tojson }}",
            **attributes,
        }
        percent = {"unit_of_measurement": "%", **measured}
        warm = {"device_class": "temperature", "unit_of_measurement": "°C", **measured}
        took = {"device_class": "duration", "unit_of_measurement": "ms", **measured}
        return [
            self._sensor("fps", "FPS", unit_of_measurement="FPS", **measured),
            self._sensor("accuracy_percent", "Accuracy", **percent, **accuracy),
            self._sensor("objects", "Objects", **measured),
            self._sensor("temperature_c", "Temperature", **warm, **diagnostic),
            self._sensor("inference_ms", "Inference", **took, **diagnostic),
            self._sensor("dropped", "Dropped frames", state_class="total_increasing", **diagnostic),
            self._sensor("model", "Model", **diagnostic),
            self._sensor("source_state", "Source", **diagnostic),
            self._entity(
                "binary_sensor",
                "problem",
                "Problem",
                state_topic=self.state,
                value_template="{{ 'ON' if value_json.problem else 'OFF' }}",
                device_class="problem",
                **text,
            ),
            self._event("events", "Events", f"{self.prefix}/events", (*KINDS, OTHER)),
        ]

    def of_class(self, name: str) -> list[Message]:
        """Returns the discovery of the number of objects of a class.

        Each class has a sensor of its own, because Home Assistant draws, keeps and triggers on
        states, not on attributes; only those seen, because a model may know a thousand.
        """
        value = f"{{{{ value_json.detections[{literal(name)}] | default(0) }}}}"
        return [self._counter(f"class_{slug(name)}", name, value)]

    def of_zone(self, name: str) -> list[Message]:
        """Returns the discovery of a zone: how many are inside, and who comes and goes."""
        zone = f"(value_json.zones[{literal(name)}] | default({{}}))"
        value = f"{{{{ {zone}.objects | default(0) }}}}"
        key = f"zone_{slug(name)}"
        return [
            self._counter(key, f"Zone {name}", value),
            self._event(f"{key}_events", f"Zone {name}", self._of_zone(name), ZONE_KINDS),
        ]

    def _sensor(self, key: str, name: str, **more: Any) -> Message:
        template = f"{{{{ value_json.{key} }}}}"
        more = {"state_topic": self.state, "value_template": template, **more}
        return self._entity("sensor", key, name, **more)

    def _counter(self, key: str, name: str, value: str) -> Message:
        more = {"state_topic": self.state, "value_template": value}
        return self._entity("sensor", key, name, state_class="measurement", **more)

    def _event(self, key: str, name: str, topic: str, kinds: tuple[str, ...]) -> Message:
        # Home Assistant ignores an empty object: nobody is to be let in an hour after the bell.
        template = "{{ '{}' if value_json.late else value }}"
        more = {"event_types": kinds, "value_template": template, "qos": 1}
        return self._entity("event", key, name, state_topic=topic, **more)

    def _entity(self, platform: str, key: str, name: str, **more: Any) -> Message:
        ident = slug(self.prefix)
        payload = {
            "name": name,
            "unique_id": f"{ident}_{key}",
            "availability_topic": self.availability,
            **more,
            "device": {
                "identifiers": [ident],
                "name": self.name,
                "manufacturer": "EdgeSight",
                "model": "EdgeSight camera",
                "sw_version": __version__,
            },
            "origin": {"name": "EdgeSight", "sw_version": __version__},
        }
        return f"{self.discovery}/{platform}/{ident}/{key}/config", to_json(payload)


def _escaped(character: str) -> str:
    return f"\\U{ord(character):08x}"


def _percent(accuracy: AccuracyFigures) -> float | None:
    """Returns the figure that stands for the others: AP50 against labels, F1 of an agreement."""
    return accuracy.get("ap50") if accuracy.get("kind") == "labels" else accuracy.get("f1")
