"""The files for many boards, with a real Prometheus that reads a real run."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

HERE = Path(__file__)
FLEET = HERE.parents[1] / "examples" / "fleet"
GUARD_S = 60
kit: Any = SimpleNamespace(**runpy.run_path(str(HERE.with_name("app_kit.py"))))
missing = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="apt-get install prometheus (.ci/run does it)"
)
OF_SOME_BOARDS = {
    "edgesight_temperature_celsius",
    "edgesight_throttled",
    "edgesight_clock_hertz",
    "edgesight_latency_seconds",  # while somebody looks
    "edgesight_zone_objects",  # while somebody is inside
}


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FLEET / "dashboard.json").read_text())
    return found


def expressions() -> list[str]:
    return [
        target["expr"].replace("$board", ".*")
        for panel in dashboard()["panels"]
        for target in panel.get("targets", ())
    ]


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that has read a board twice; gives its address."""
    folder = tmp_path_factory.mktemp("fleet")
    for name in ("alerts.yml", "prometheus.yml"):
        shutil.copy(FLEET / name, folder)
    config = (folder / "prometheus.yml").read_text()
    assert "scrape_interval: 10s" in config
    (folder / "prometheus.yml").write_text(config.replace("_interval: 10s", "_interval: 1s"))
    (folder / "token").write_text("t" * 40 + "\n")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    run = ("-m", "edgesight", "run", "--port", "0", "--no-browser", "--host", "0.0.0.0")
    words = ("--zone", "all: 0,0 1,0 1,1 0,1", "--token-file", str(folder / "token"))
    with kit.process(*run, *words) as running:
        assert running.stdout is not None
        text = ""
        while not (link := re.search(r"http://[^ ]*?:(\d+)", text)):
            text = running.stdout.readline()
            assert text, "the run has ended"
        boards = [{"targets": [f"127.0.0.1:{link[1]}"]}]
        (folder / "boards.json").write_text(json.dumps(boards))
        server = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            until = time.monotonic() + GUARD_S
            # Rates need two readings; agreement needs the reference's first frames.
            while not (
                ask(url, "rate(edgesight_frames_total[1m]) > 0")
                and ask(url, 'edgesight_accuracy_ratio{measure="f1"}')
            ):
                assert time.monotonic() < until, "the board was never read"
                time.sleep(0.5)
            yield url
        finally:
            server.terminate()
            server.wait(GUARD_S)


def ask(url: str, expression: str) -> list[Any]:
    query = urllib.parse.urlencode({"query": expression})
    try:
        with urllib.request.urlopen(f"{url}/api/v1/query?{query}", timeout=GUARD_S) as answer:
            found = json.load(answer)
    except urllib.error.HTTPError as error:
        pytest.fail(f"{expression}: {error.read().decode()[:200]}")
    except OSError:  # not up yet
        return []
    assert found["status"] == "success"
    result: list[Any] = found["data"]["result"]
    return result


@missing
def test_every_panel_shows_something(prometheus: str) -> None:
    empty = [e for e in expressions() if not ask(prometheus, e)]
    names = {name for e in empty for name in re.findall(r"edgesight_\w+", e)}
    assert names <= OF_SOME_BOARDS, empty
    assert len(expressions()) > 15


@missing
def test_no_alert_is_raised_by_a_healthy_board(prometheus: str) -> None:
    with urllib.request.urlopen(f"{prometheus}/api/v1/rules", timeout=GUARD_S) as answer:
        rules = json.load(answer)["data"]["groups"][0]["rules"]
    assert len(rules) >= 5
    for rule in rules:
        assert rule["health"] in ("ok", "unknown"), rule["lastError"]
        assert ask(prometheus, rule["query"]) == [], rule["name"]


@missing
def test_alerts_are_raised() -> None:
    """By what they are for: Prometheus's own unit test of rules."""
    series = {
        "EdgeSightGone": ("up{job='edgesight',instance='a'}", "0x20"),
        "EdgeSightNoFrames": ("edgesight_source_up{instance='a'}", "0x20"),
        "EdgeSightHeldBack": ("edgesight_throttled{instance='a',reason='throttled'}", "1x20"),
        "EdgeSightDisagrees": (
            "edgesight_accuracy_ratio{instance='a',measure='f1_high'}",
            "0.5x20",
        ),
        "EdgeSightWarns": ("edgesight_warnings{instance='a'}", "2x20"),
    }
    names = set(re.findall(r"alert: (\w+)", (FLEET / "alerts.yml").read_text()))
    assert names == set(series)
    for name, (metric, values) in series.items():
        test = (
            f"rule_files: [{FLEET / 'alerts.yml'}]\n"
            "evaluation_interval: 1m\ntests:\n  - interval: 1m\n    input_series:\n"
            f'      - {{series: "{metric}", values: "{values}"}}\n'
            "    promql_expr_test:\n"
            f'      - {{expr: \'count(ALERTS{{alertname="{name}",alertstate="firing"}})\','
            " eval_time: 15m, exp_samples: [{labels: '{}', value: 1}]}\n"
        )
        done = subprocess.run(
            ["promtool", "test", "rules", "/dev/stdin"],
            input=test, capture_output=True, text=True, timeout=GUARD_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr


def test_panels_stand_beside_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
