"""The command line: help, exit codes, and that it starts at once."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import edgesight
import pytest
from edgesight.__main__ import COMMANDS, main

HEAVY = ("torch", "cv2", "onnxruntime", "onnx", "numpy", "starlette", "uvicorn", "tqdm")


def run_python(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs this Python with the package that is under test."""
    parents = [entry for entry in sys.path if entry and (Path(entry) / "edgesight").is_dir()]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(parents)}
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, timeout=120, cwd=cwd, env=env
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_and_exit_codes(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: edgesight {command}" in text
    assert f"example: edgesight {command}" in text
    assert "exit codes: 0 done, 1 a check failed, 2 wrong input" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_option_is_wrong_input(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--no-such-option"])
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_the_overview_names_every_command(
    args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: object = main(args)
    except SystemExit as stop:
        code = stop.code
    assert code == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert f"\n  {command} " in text
    assert "exit codes:" in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"edgesight {edgesight.__version__}\n"


@pytest.mark.parametrize(
    ("wrong", "hint"), [("rum", "did you mean 'run'?"), ("fetsh", "did you mean 'fetch'?")]
)
def test_an_unknown_command_gets_a_suggestion(
    wrong: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([wrong])
    assert stop.value.code == 2
    assert hint in capsys.readouterr().err


def test_nothing_like_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["xyzzy"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "expected one of run," in error
    assert "did you mean" not in error


def test_a_wrong_input_is_one_line_and_no_traceback(tmp_path: Path) -> None:
    done = run_python("-m", "edgesight", "fetch", "no_such_model", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("edgesight: error: expected one of ")
    assert done.stderr.count("\n") == 1


def test_help_loads_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from edgesight.__main__ import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        f"print(sorted(set(sys.modules) & set({HEAVY!r})), file=sys.stderr)\n"
    )
    done = run_python("-c", code, cwd=tmp_path)
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize("command", ["run", "eval", "inspect", "bench", "fetch"])
def test_the_boards_commands_load_no_torch(command: str, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from edgesight.__main__ import main\n"
        f"try:\n    main(['{command}', '--help'])\nexcept SystemExit:\n    pass\n"
        "print('torch' in sys.modules, file=sys.stderr)\n"
    )
    done = run_python("-c", code, cwd=tmp_path)
    assert done.stderr.strip() == "False"


def test_help_is_instant(tmp_path: Path) -> None:
    def seconds(*args: str) -> float:
        start = time.perf_counter()
        assert run_python(*args, cwd=tmp_path).returncode == 0
        return time.perf_counter() - start

    run_python("-m", "edgesight", "--help", cwd=tmp_path)  # writes the .pyc files
    pairs = [(seconds("-m", "edgesight", "--help"), seconds("-c", "pass")) for _ in range(5)]
    # The promise is 0.3 s; a busy machine is slow for an empty Python as well.
    assert statistics.median(ours - empty for ours, empty in pairs) < 0.25
