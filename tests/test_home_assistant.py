"""What Home Assistant is told: as it documents it, and rendered by the template engine it uses."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from edgesight.device_app.events import Event
from edgesight.device_app.home_assistant import (
    KINDS,
    Topics,
    literal,
    problem_of,
    slug,
    state_of,
    to_json,
)
from edgesight.device_app.live import LiveView
from edgesight.device_app.mqtt import NAMES_MAX, MqttLink
from jinja2.sandbox import ImmutableSandboxedEnvironment

kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("mqtt_kit.py"))))
figures, until = kit.figures, kit.until
pytestmark = pytest.mark.usefixtures("no_thread_left")

NAMES = (
    "cat",
    "traffic light",
    "+/#",
    "it's",
    'quo"te',
    "back\\slash",
    "}} {{ 1/0 }}",
    "{% endif %}",
    "' ~ 1 ~ '",
    "катя",
    "😀\n",
    "",
)
TOPICS = Topics("edgesight/porch", "The porch", "homeassistant")


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Any]:
    found = kit.Broker(tmp_path)
    yield found
    found.kill()


@pytest.fixture
def ear(broker: Any) -> Iterator[Any]:
    found = kit.Ear(broker)
    yield found
    found.close()


def link_to(broker: Any, live: LiveView, **more: Any) -> MqttLink:
    link = MqttLink(f"mqtt://127.0.0.1:{broker.port}", live, name="The porch", **more)
    link.start()
    return link


def render(template: str, payload: Any) -> str:
    """Renders as Home Assistant does: its own engine is this one with more functions."""
    text = payload if isinstance(payload, str) else to_json(payload)
    found = ImmutableSandboxedEnvironment().from_string(template)
    return found.render(value=text, value_json=json.loads(text))


def values(state: Any, *parts: list[tuple[str, str]]) -> dict[str, str]:
    """Returns what the sensors of a state show, by name."""
    configs = [json.loads(payload) for messages in parts for _, payload in messages]
    return {
        config["name"]: render(config["value_template"], state)
        for config in configs
        if config["state_topic"] == TOPICS.state
    }


def test_sensors_show_the_state() -> None:
    board = {"temperature_c": 84.5, "throttled": ["throttled"], "says": "it is hot"}
    state = state_of(figures({"cat": 2, "dog": 1}, board=board))
    assert values(state, TOPICS.device(), TOPICS.of_class("cat"), TOPICS.of_class("cow")) == {
        "FPS": "12.5",
        "Accuracy": "81.0",
        "Objects": "3",
        "Temperature": "84.5",
        "Inference": "70.0",
        "Dropped frames": "3",
        "Model": "tiny",
        "Source": "running",
        "Problem": "ON",
        "cat": "2",
        "cow": "0",
    }
    attributes = {}
    for _, payload in TOPICS.device():
        config = json.loads(payload)
        if "json_attributes_template" in config:
            shown = render(config["json_attributes_template"], state)
            attributes[config["name"]] = json.loads(shown)
    assert attributes["Problem"] == {"text": "it is hot"}
    assert attributes["Accuracy"]["text"] == "with float"


def test_sensors_of_a_run_that_knows_nothing_yet() -> None:
    state = state_of({"model": "x" * 300})
    found = values(state, TOPICS.device(), TOPICS.of_class("cat"), TOPICS.of_zone("door"))
    assert found["Model"] == "x" * 255  # Home Assistant takes no longer ones
    assert found["FPS"] == found["Accuracy"] == found["Temperature"] == "None"  # unknown, to it
    assert (found["Problem"], found["cat"], found["Zone door"]) == ("OFF", "0", "0")


@pytest.mark.parametrize("name", NAMES)
def test_no_name_breaks_a_template_or_a_topic(name: str) -> None:
    state = state_of(figures({name: 7, "other": 1}, zones={name: {name: 3, "x": 2}}))
    assert list(values(state, TOPICS.of_class(name)).values()) == ["7"]
    assert list(values(state, TOPICS.of_zone(name)).values()) == ["5"]
    assert render(f"{{{{ {literal(name)} }}}}", {}) == name
    for topic, payload in TOPICS.of_class(name) + TOPICS.of_zone(name):
        assert re.fullmatch(
            r"homeassistant/(sensor|event)/edgesight_porch_\w{6}/[A-Za-z0-9_-]+/config", topic
        )
        assert not re.search(r"[+#\s]", json.loads(payload)["state_topic"])


def test_names_stay_apart() -> None:
    assert slug("cat-1_A") == "cat-1_A"
    assert len(
        {slug(name) for name in (*NAMES, "a b", "a/b", "a+b", "a_b", 70 * "x", 71 * "x")}
    ) == (len(NAMES) + 6)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+", slug(name)) for name in NAMES)


def test_what_is_needed_is_in_every_message() -> None:
    messages = TOPICS.device() + TOPICS.of_class("cat") + TOPICS.of_zone("door")
    configs = [json.loads(payload) for _, payload in messages]
    for (topic, _), config in zip(messages, configs, strict=True):
        assert {"name", "unique_id", "state_topic", "value_template"} <= config.keys()
        assert config["availability_topic"] == "edgesight/porch/availability"
        assert config["device"]["name"] == "The porch"
        assert config["device"]["identifiers"]
        assert config["origin"]["name"] == "EdgeSight"
        platform = topic.split("/")[1]
        assert platform in ("sensor", "binary_sensor", "event")
        assert ("event_types" in config) == (platform == "event")
        assert "command_topic" not in config
    assert len({config["unique_id"] for config in configs}) == len(configs) == 13
    assert len({topic for topic, _ in messages}) == len(configs)
    others = [json.loads(p) for _, p in Topics("edgesight/barn", "The porch", "h").device()]
    assert not {c["unique_id"] for c in others} & {c["unique_id"] for c in configs}


def test_events_fit_their_entities() -> None:
    configs = [json.loads(p) for _, p in TOPICS.device() + TOPICS.of_zone("a b")]
    types = {c["state_topic"]: c["event_types"] for c in configs if "event_types" in c}
    for event in (
        *(Event(kind, "") for kind in KINDS),
        Event("enter", "", data={"zone": "a b"}),
        Event("leave", "", data={"zone": "a b"}),
        Event("enter", "without a zone"),
        Event("new one", ""),
    ):
        topic, payload = TOPICS.event(event, late=False)
        assert json.loads(payload)["event_type"] in types[topic], event
        assert json.loads(payload)["kind"] == event.kind
    template = next(c["value_template"] for c in configs if "event_types" in c)
    on_time = TOPICS.event(Event("source", "lost", 1.0), late=False)[1]
    assert render(template, on_time) == on_time
    assert render(template, TOPICS.event(Event("source", "lost", 1.0), late=True)[1]) == "{}"


def test_problems() -> None:
    assert problem_of(figures()) is None
    assert problem_of(figures(source_state="ended")) is None
    board = {"temperature_c": 84.5, "throttled": ["throttled"], "says": None}
    wrong = figures(source_state="retrying: gone", board=board, warnings=["no disk"])
    assert problem_of(wrong) == "source retrying: gone; throttled; no disk"


def test_discovery_is_kept_and_told_again(broker: Any, ear: Any) -> None:
    live = LiveView()
    live.set_figures(figures({}, zones={"door": {}}))
    link = link_to(broker, live)

    def names() -> set[str]:
        return {c["name"] for c in ear.under("homeassistant/").values()}

    until(lambda: {"FPS", "Problem", "Events", "Zone door"} <= names())
    assert "cat" not in names()
    live.set_figures(figures({"cat": 1}, zones={"door": {"cat": 1}}))
    until(lambda: "cat" in names())
    first = {c["unique_id"] for c in ear.under("homeassistant/").values()}
    before = [topic for topic, _, _ in ear.heard]

    ear.say("homeassistant/status", "offline")
    ear.say("homeassistant/status", "online")
    again = {topic for topic in before if topic.startswith("homeassistant/")}
    until(lambda: all([t for t, _, _ in ear.heard].count(topic) == 2 for topic in again))
    link.stop()

    newcomer = kit.Ear(broker)
    until(lambda: len(newcomer.under("homeassistant/")) == len(first))
    second = link_to(broker, live)
    until(lambda: all(len(newcomer.told(topic)) == 2 for topic in again))
    second.stop()
    assert {c["unique_id"] for c in newcomer.under("homeassistant/").values()} == first
    newcomer.close()


def test_no_more_sensors_than_anybody_wants(broker: Any, ear: Any) -> None:
    live = LiveView()
    live.set_figures(figures({f"class {i}": 1 for i in range(NAMES_MAX + 50)}, zones={"door": {}}))
    link = link_to(broker, live)
    until(lambda: any("zone_door_events" in topic for topic in ear.under("homeassistant/")))
    classes = [topic for topic in ear.under("homeassistant/") if "/class_" in topic]
    assert len(classes) == NAMES_MAX
    link.stop()


def test_without_discovery_nothing_is_told(broker: Any, ear: Any) -> None:
    live = LiveView()
    live.set_figures(figures())
    link = link_to(broker, live, discovery=None)
    live.events.add("source", "lost")
    until(lambda: ear.told("edgesight/The_porch_" + link.topics.prefix[-6:] + "/events"))
    link.stop()
    assert {topic.split("/")[0] for topic, _, _ in ear.heard} == {"edgesight"}
