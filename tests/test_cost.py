"""The command ``cost``: a real count in the emulator, and what it says when something is amiss."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from edgesight.__main__ import main
from edgesight.compression import verify
from edgesight.compression.report import headline
from edgesight.models import cost, emulator, machine
from edgesight.models.core_costs import conv_instructions
from edgesight.models.errors import DownloadError, EdgeSightError, ModelFileError
from onnx import helper, numpy_helper

CHANNELS, HEIGHT, WIDTH = 64, 18, 24
CORE = "cortex-a76"


def write_conv(
    path: Path, *, integer: bool = False, batch: int | str = 1, height: int | str = HEIGHT
) -> Path:
    """Writes a model of one 1x1 convolution, in float or as 8-bit integers between quantizers."""
    rng = np.random.default_rng(0)
    weight = rng.integers(-127, 127, (CHANNELS, CHANNELS, 1, 1))
    stored: dict[str, Any] = {"w": weight.astype(np.float32)}
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"])]
    if integer:
        stored = {"w8": weight.astype(np.int8), "one": np.float32(1), "zero": np.int8(0)}
        grid = ["one", "zero"]
        nodes = [
            helper.make_node("QuantizeLinear", ["x", *grid], ["x8"]),
            helper.make_node("DequantizeLinear", ["x8", *grid], ["a"]),
            helper.make_node("DequantizeLinear", ["w8", *grid], ["w"]),
            helper.make_node("Conv", ["a", "w"], ["c"]),
            helper.make_node("QuantizeLinear", ["c", *grid], ["c8"]),
            helper.make_node("DequantizeLinear", ["c8", *grid], ["y"]),
        ]
    shape = [batch, CHANNELS, height, WIDTH]
    graph = helper.make_graph(
        nodes,
        "conv",
        [helper.make_tensor_value_info("x", 1, shape)],
        [helper.make_tensor_value_info("y", 1, shape)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in stored.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models to count, some of which cannot be."""
    folder = tmp_path_factory.mktemp("models")
    found = {
        "float": write_conv(folder / "float.onnx"),
        "broken": folder / "broken.onnx",
        "int8": write_conv(folder / "int8.onnx", integer=True, batch="N"),
        "free": write_conv(folder / "free.onnx", height="h"),
        "missing": folder / "missing.onnx",
    }
    found["broken"].write_bytes(found["float"].read_bytes()[:900])
    return found


@pytest.fixture(scope="module")
def counted(files: dict[str, Path], own_cache: Path) -> list[cost.Cost | ModelFileError]:
    """All models counted in one boot, the emulated computer fetched before."""
    if shutil.which(emulator.QEMU) is None:
        pytest.skip("apt-get install qemu-system-arm")
    assert emulator.find_guest() is None, "the session's cache starts empty"
    try:
        return cost.count(list(files.values()), CORE, layers=True)
    except DownloadError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))


Counted = list[cost.Cost | ModelFileError]


@pytest.mark.timeout(900)
def test_what_was_counted(counted: Counted) -> None:
    floating, _, integer, _, _ = counted
    assert isinstance(floating, cost.Cost)
    assert isinstance(integer, cost.Cost)
    for found, kind, op in ((floating, "float", "Conv"), (integer, "s8", "QLinearConv")):
        (conv,) = (node for node in found.nodes if node.op == op)
        wanted = conv_instructions(CORE, kind, CHANNELS, CHANNELS, (1, 1), 1, HEIGHT * WIDTH)
        assert conv.instructions == pytest.approx(wanted, rel=0.15)
        assert conv.instructions < found.instructions < 2 * conv.instructions + 300_000
        assert found.spread < 0.5  # an interrupt is a good part of so small a network
        assert found.finite
        assert found.runs == 3
        assert found.nodes[0].shapes
    assert integer.instructions < floating.instructions  # the batch that was free became 1


def test_bad_files_do_not_harm_the_others(counted: Counted, files: dict[str, Path]) -> None:
    _, broken, _, free, missing = counted
    for row, name, why in (
        (broken, "broken", "cannot be counted on cortex-a76"),
        (free, "free", "expected an input of fixed size, found x"),
        (missing, "missing", "no such file"),
    ):
        assert isinstance(row, ModelFileError)
        assert str(files[name]) in str(row)
        assert why in str(row)
        assert "\n" not in str(row)


@pytest.fixture
def no_boot(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> Iterator[str]:
        message = "booted"
        raise AssertionError(message)

    monkeypatch.setattr(cost, "boot", refuse)


@pytest.mark.usefixtures("no_boot")
def test_the_command_reads_the_cache(
    counted: Counted, files: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    moved = shutil.copyfile(files["int8"], tmp_path / "other_name.onnx")  # the content counts
    first = counted[0]
    assert isinstance(first, cost.Cost)
    assert main(["cost", str(files["float"]), str(moved), "--layers", "1"]) == 0
    text = capsys.readouterr().out
    assert f"{first.instructions / 1e6:.1f}   1.000" in text
    assert "by operator: 1 Conv" in text
    assert "1x64x18x24" in text
    models = [str(files["float"]), str(files["missing"]), str(moved)]
    assert main(["cost", *models, "--json"]) == 2
    (core,) = json.loads(capsys.readouterr().out)["cores"]
    assert core["core"] == CORE
    assert [row["error"] is None for row in core["models"]] == [True, False, True]
    assert core["models"][0]["instructions"] == first.instructions
    assert core["models"][2]["ratio"] < 1
    with pytest.raises(AssertionError, match="booted"):  # more runs than were counted
        cost.count([files["float"]], CORE, runs=4, progress=False)
    with pytest.raises(AssertionError, match="booted"):
        cost.count([files["float"]], "cortex-a72", progress=False)


@pytest.mark.usefixtures("no_boot")
def test_a_report_shows_before_and_after(
    counted: Counted, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "CORES", (CORE, "x86-64"))
    rows = verify.costs_by_core(verify.Subject(files["float"], files["int8"]), progress=False)
    first, last = counted[0], counted[2]
    assert isinstance(first, cost.Cost)
    assert isinstance(last, cost.Cost)
    assert (rows[0]["before"], rows[0]["instructions"]) == (first.instructions, last.instructions)
    assert rows[0]["target"]
    assert rows[1]["instructions"] is None
    assert rows[1]["reason"]


def says(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Returns the one line that the command ends with."""
    assert main(["cost", *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    return output.err


def test_without_the_emulator(
    files: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "apt-get install qemu-system-arm" in says(capsys, str(files["float"]))
    rows = verify.costs_by_core(verify.Subject(files["float"], files["int8"]), progress=False)
    assert [row["core"] for row in rows] == ["cortex-a76", "cortex-a72", "x86-64"]
    assert all(row["instructions"] is None for row in rows)
    assert "qemu-system-arm" in rows[0]["reason"]


def script(path: Path, *lines: str) -> None:
    path.write_text("\n".join(("#!/bin/sh", *lines, "")))
    path.chmod(0o755)


def test_without_apt_and_without_a_network(
    files: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tools, cache = tmp_path / "bin", tmp_path / "cache"
    tools.mkdir()
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setenv("EDGESIGHT_CACHE", str(cache))
    script(tools / emulator.QEMU, "echo QEMU emulator version 7.2.22")
    rows = verify.costs_by_core(verify.Subject(files["float"], files["int8"]), progress=False)
    assert "edgesight cost --setup" in rows[0]["reason"]
    assert "expected apt-get" in says(capsys, str(files["float"]))
    script(tools / "apt-get", "echo 'E: Failed to fetch: no route' >&2", "exit 100")
    script(tools / "apt-cache", "exit 1")
    script(tools / "dpkg-deb", "exit 1")
    line = says(capsys, "--setup", "--quiet")
    assert "Failed to fetch: no route" in line
    assert "check the network" in line
    assert not list(cache.iterdir())  # nothing half-made stays


def test_wrong_arguments(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "expected a model" in says(capsys)
    with pytest.raises(SystemExit) as ended:
        main(["cost", str(tmp_path), "--core", "cortex-m4"])
    assert ended.value.code == 2
    with pytest.raises(SystemExit):
        main(["cost", str(tmp_path), "--runs", "0"])


def fake_guest(monkeypatch: pytest.MonkeyPatch, folder: Path, boots: list[list[str]]) -> list[Any]:
    """Puts prepared console lines in the emulator's place; returns what each boot was given."""
    given: list[Any] = []

    def boot(
        guest: object, core: str, contents: Mapping[str, bytes], silence: float
    ) -> Iterator[str]:
        given.append(json.loads(contents["models/asked.json"])["numbers"])
        for said in boots[len(given) - 1]:
            if said == "silence":
                message = "expected an answer within 1 s, found none"
                raise emulator.EmulatorError(message)
            yield said

    monkeypatch.setenv("EDGESIGHT_CACHE", str(folder / "cache"))
    monkeypatch.setattr(cost, "boot", boot)
    monkeypatch.setattr(cost, "find_qemu", lambda: Path("qemu"))
    monkeypatch.setattr(cost, "qemu_version", lambda path: "1")
    guest = emulator.Guest(folder, folder, "1.0")
    monkeypatch.setattr(cost, "make_guest", lambda progress: guest)
    return given


def line(**said: Any) -> str:
    return f"{cost.MARK}\t{json.dumps(said)}"


def test_a_model_that_ends_the_computer_is_named_and_the_rest_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    paths = [tmp_path / f"{i}.onnx" for i in range(4)]
    for path in paths:
        path.write_bytes(path.name.encode())
    done = {"runs": [100, 104, 96], "finite": True}
    boots = [
        [line(start="1.0"), line(begin=0), line(done=0, **done), line(begin=1), "Kernel panic"],
        [line(begin=2), "silence"],
        [line(begin=3), line(done=3, **done)],
    ]
    given = fake_guest(monkeypatch, tmp_path, boots)
    first, killer, sleeper, last = cost.count(paths, CORE, progress=False)
    assert given == [[0, 1, 2, 3], [2, 3], [3]]
    assert isinstance(first, cost.Cost)
    assert isinstance(last, cost.Cost)
    assert (first.instructions, first.spread, last.instructions) == (100, 0.08, 100)
    assert "1.onnx: cannot be counted on cortex-a76: it ended the emulated computer" in str(killer)
    assert "found none" in str(sleeper)


def test_a_computer_that_does_not_start_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(b"a")
    fake_guest(monkeypatch, tmp_path, [["no such kernel"]])
    with pytest.raises(EdgeSightError, match=r"to start, found on its console: no such kernel"):
        cost.count([path], CORE, progress=False)


def test_headline_shows_counted_cores() -> None:
    step = {"bytes": 1, "macs": 1}
    score: dict[str, Any] = {"kind": "f1", "value": 1.0, "low": 1.0, "high": 1.0, "lost": None}
    counted = {"core": CORE, "before": 341_800_000, "instructions": 114_000_000, "ratio": 1 / 3}
    verified = {
        **{"before": score, "after": score, "agreement": score, "latency": None},
        **{"integer": {"quantized": False}, "cores": [counted]},
    }
    rows = headline({"steps": [step, step], "verify": verified})
    assert ("instructions on cortex-a76", "341.8 M -> 114.0 M", "ratio 0.33") in rows


@pytest.mark.parametrize(
    ("core", "kind", "flags", "spoken"),
    [
        ("cortex-a72", "x86_64", "avx512_vnni", True),
        ("cortex-a76", "x86_64", "", False),
        ("x86-64", "x86_64", "sse2 avx2", True),
        ("x86-64", "x86_64", "avx2 avx_vnni", False),
        (None, "aarch64", "fp asimd", True),
        (None, "aarch64", "fp asimd asimddp", False),
        (None, "riscv64", "", False),
    ],
)
def test_int8_advice(
    core: str | None, kind: str, flags: str, spoken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.platform, "machine", lambda: kind)
    monkeypatch.setattr(machine, "_flags", lambda: frozenset(flags.split()))
    advice = machine.int8_advice(core)
    assert (advice is not None) == spoken
    if advice is not None:
        assert "INT8 gains little speed" in advice
        assert "\n" not in advice
