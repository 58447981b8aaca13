"""``edgesight doctor``: what it prints and returns, and that it outlives what it looks at."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
from edgesight import __main__ as program
from edgesight.deploy import doctor
from edgesight.deploy.doctor import examine, table
from edgesight.deploy.finding import Finding, Probe, from_json, to_json, worst
from edgesight.models.errors import InputError
from edgesight.models.zoo import shipped

HEAVY = "numpy cv2 onnxruntime openvino torch"
FINE = Finding("numpy", "ok", "2.4.6")
BAD = Finding("power", "error", "under-voltage now", "the supply is too weak", "sudo poweroff")


@pytest.fixture(autouse=True)
def _command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(program.COMMANDS, "doctor", (".deploy.doctor", "says what is wrong"))


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
    """What the doctor finds; to be filled."""
    findings = list[Finding]()
    monkeypatch.setattr(doctor, "examine", lambda *words, **more: findings)
    return findings


def test_it_imports_nothing_heavy() -> None:
    code = (
        "import sys; from edgesight.deploy.doctor import examine, title, Probe; examine(); "
        f"title(Probe()); print(*set('{HEAVY}'.split()) & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == ""


def test_it_runs_where_nothing_is_installed(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", symlinks=True)
    package = tmp_path / "lib/edgesight"
    package.parent.mkdir()
    package.symlink_to(Path(program.__file__).parent)
    code = (
        "import sys; from edgesight import __main__ as m; "
        "m.COMMANDS['doctor'] = ('.deploy.doctor', ''); sys.exit(m.main(['doctor', '--json']))"
    )
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(package.parent)}
    python = str(tmp_path / "venv/bin/python")
    done = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, env=environ, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (1, "")
    errors = {f.name for f in from_json(done.stdout) if f.severity == "error"}
    assert {"numpy", "opencv", "onnxruntime", "packages"} <= errors


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["doctor", "--model", "shipped", "--json"]) in (0, 1)
    found = {f.name: f for f in from_json(capsys.readouterr().out)}
    names = {"system", "python", "processor", "numpy", "opencv", "onnxruntime", "power", "model"}
    assert names <= found.keys()
    assert {found[name].severity for name in ("numpy", "opencv", "onnxruntime", "model")} == {"ok"}


@pytest.mark.parametrize(("findings", "code"), [([FINE], 0), ([FINE, BAD], 1), ([], 0)])
@pytest.mark.parametrize("json_too", [False, True])
def test_exit_codes(
    says: list[Finding],
    capsys: pytest.CaptureFixture[str],
    findings: list[Finding],
    code: int,
    json_too: bool,
) -> None:
    says += findings
    assert program.main(["doctor", *["--json"] * json_too]) == code
    printed = capsys.readouterr().out
    if json_too:
        assert from_json(printed) == findings
        assert len(printed.splitlines()) == 1


def test_a_warning_is_no_failure(says: list[Finding]) -> None:
    says.append(Finding("governor", "warning", "powersave"))
    assert program.main(["doctor"]) == 0


def test_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert program.main(["doctor", "--model", str(tmp_path / "none.onnx")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "expected a model file, found none" in printed.err
    assert len(printed.err.splitlines()) == 1


def test_a_model_that_is_cut_short(tmp_path: Path) -> None:
    model = tmp_path / "short.onnx"
    model.write_bytes(shipped().read_bytes()[:100_000])
    found = examine(Probe(), model=model)[-1]
    assert (found.name, found.severity) == ("model", "error")
    assert str(model) in found.found
    assert found.mend == f"edgesight inspect {model}"


def test_a_model_is_not_tried_with_broken_packages(tmp_path: Path) -> None:
    found = examine(Probe(python=tmp_path / "nowhere"), model=shipped())[-1]
    assert (found.severity, found.why) == ("warning", "without python no model runs")


def test_a_part_that_fails_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(probe: Probe) -> list[Finding]:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(doctor, "examine_board", broken)
    found = {f.name: f for f in examine(Probe())}
    assert found["board"].severity == "warning"
    assert "Input/output error" in found["board"].found
    assert {"processor", "numpy", "cameras"} <= found.keys() | {"cameras"}


def test_a_bad_board_as_a_whole(tmp_path: Path) -> None:
    files = {
        "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0",
        "proc/cpuinfo": "Features : fp asimd\nCPU implementer : 0x41\nCPU part : 0xd08\n",
        "sys/devices/platform/soc/soc:firmware/get_throttled": "0x50005\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave\n",
        "proc/mounts": "/dev/root / ext4 ro 0 0\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = examine(Probe(tmp_path), camera="0")
    assert worst(found) == "error"
    told = {f.name: f.severity for f in found if f.severity != "ok"}
    assert told.items() >= {
        "processor": "note", "governor": "warning", "power": "error", "throttling": "warning",
        "disk /": "error", "picamera2": "warning", "camera 0": "error",
    }.items()  # fmt: skip
    assert all(f.found and f.why and f.mend for f in found if f.severity in ("warning", "error"))


def test_the_table() -> None:
    text = table([FINE, BAD], "a board")
    assert text.splitlines() == [
        "a board",
        "",
        "ok        numpy                2.4.6",
        "error     power                under-voltage now",
        "          the supply is too weak",
        "          mend: sudo poweroff",
        "",
        "1 error, 1 ok",
    ]
    assert "\x1b" not in text
    assert "\x1b[31;1merror   \x1b[0m" in table([BAD], "a board", colors=True)


def test_long_text_wraps_but_a_command_does_not() -> None:
    finding = Finding("x", "warning", "word " * 60, "why " * 60, "command " * 60)
    lines = table([finding], "a board").splitlines()
    long = [line for line in lines if len(line) > doctor.WIDTH_MAX]
    assert [line.strip().split()[0] for line in long] == ["mend:"]


def test_text_from_outside_does_not_command_the_terminal() -> None:
    text = table([Finding("x", "error", "a\x1b[2Jb\nc", "d\x07", "e\r\x9bf")], "a board")
    assert not set(text) & set("\x1b\x07\r\x9b")


def test_colors_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert doctor._wants_colors()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not doctor._wants_colors()
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert not doctor._wants_colors()


def test_json_there_and_back() -> None:
    value = to_json([FINE, BAD])
    assert value["worst"] == "error"
    assert from_json(json.dumps(value)) == [FINE, BAD]


GOOD: dict[str, Any] = to_json([BAD])
SPOILT: list[Any] = [
    "",
    "bash: edgesight: command not found",
    [],
    {**GOOD, "kind": "other"},
    {**GOOD, "findings": 3},
    {**GOOD, "findings": [{"name": "x"}]},
    {**GOOD, "findings": [{**GOOD["findings"][0], "severity": "fatal"}]},
    {**GOOD, "findings": [{**GOOD["findings"][0], "found": 3}]},
    "[" * 100_000,
]


@pytest.mark.parametrize("value", SPOILT)
def test_what_is_no_answer_of_a_doctor(value: Any) -> None:
    text = value if isinstance(value, str) else json.dumps(value)
    with pytest.raises(InputError, match=r"expected .*, found .*; "):
        from_json(text)
