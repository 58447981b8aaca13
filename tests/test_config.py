"""``run --config``: one TOML file with the options, checked as on the command line."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from edgesight.__main__ import main
from edgesight.device_app.config import BYTES_MAX

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("app_kit.py"))))
EVERYTHING = """
source = "picamera"
host = "0.0.0.0"
score = 0.5
threads = 3
loop = true
speed = "max"
size = "640x480"
fps = 12.5
rotate = 90
focus = 2
exposure-us = 8000
video = "out.mp4"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "edgesight.toml"


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["run", *words, "--print-config"]) == 0
    return tomllib.loads(capsys.readouterr().out)


def test_the_file_goes_before_the_defaults_and_the_command_line_before_the_file(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(EVERYTHING)
    found = printed(capsys, "--config", str(file))
    assert found["source"] == "picamera"
    assert found["size"] == "640x480"
    assert found["focus"] == 2
    assert found["exposure_us"] == 8000
    assert found["loop"] is True
    assert found["display"] == "web", "not in the file"
    assert "frames" not in found
    over = printed(capsys, "--score", "0.35", f"--config={file}", "--source", "0")
    assert (over["source"], over["score"], over["fps"]) == ("0", 0.35, 12.5)


def test_what_is_printed_is_a_file_that_says_the_same(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(EVERYTHING)
    first = printed(capsys, "--config", str(file), "--jsonl", 'odd "name" ü.jsonl')
    main(["run", "--config", str(file), "--jsonl", 'odd "name" ü.jsonl', "--print-config"])
    again = tmp_path / "again.toml"
    again.write_text(capsys.readouterr().out, encoding="utf-8")
    assert printed(capsys, "--config", str(again)) == first


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("soruce = 'x'", "unknown option 'soruce'; did you mean 'source'?"),
        ("zzz = 1", "unknown option 'zzz'; known: model, source"),
        ("config = 'x'", "unknown option 'config'"),
        ("fps = 0", "fps: expected a number from 0.1 to 1000, found '0'"),
        ("threads = 1.5", "threads: expected a number"),
        ("rotate = 45", "rotate: expected one of 0, 90, 180, 270, found 45"),
        ("rotate = 'up'", "rotate: expected a number, found 'up'"),
        ("display = 'tv'", "display: expected one of web, window, both, none, found 'tv'"),
        ("size = [640, 480]", "size: expected a text or a number, found [640, 480]"),
        ("loop = 1", "loop: expected true or false, found 1"),
        ("port = true", "port: expected a text or a number, found True"),
        ("fps = nan", "fps: expected a number"),
        ("[camera]\nfps = 3", "unknown option 'camera'"),
        ("fps = ", "expected TOML, found an error"),
        ("a = " + "[" * 5000, "expected TOML, found an error"),
        ("#" * (BYTES_MAX + 1), "expected at most"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(
    file: Path, capsys: pytest.CaptureFixture[str], text: str, words: str
) -> None:
    file.write_text(text)
    assert main(["run", "--config", str(file)]) == 2
    told = capsys.readouterr().err
    assert f"{file}: " in told
    assert words in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_file_that_is_missing_or_no_text(
    file: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    if content is not None:
        file.write_bytes(content)
    assert main(["run", "--config", str(file)]) == 2
    assert f"{file}: expected" in capsys.readouterr().err


def test_an_option_that_is_cut_short_is_refused(file: Path) -> None:
    """Or it would be read, and the file it names would not."""
    file.write_text("frames = 3")
    with pytest.raises(SystemExit):
        main(["run", "--conf", str(file)])


def test_a_run_from_a_file(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = kit.build_tiny(tmp_path / "tiny.onnx")
    file.write_text(
        f'model = "{tiny}"\ndisplay = "none"\nframes = 7\nreference = "none"\njson = true\n'
    )
    assert main(["run", "--config", str(file)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["frames"] == 7
