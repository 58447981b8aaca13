"""The built wheel: what is in it, and that it does the main job far from the checkout."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import edgesight
import pytest

ROOT = Path(__file__).parent.parent
# What a clone does not have: leftovers of builds would find their way into the wheel.
LEFTOVERS = shutil.ignore_patterns(
    ".*", "__pycache__", "*.pyc", "build", "dist", "*.egg-info", "runs", "venv"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source archive, and the wheel that was built from that archive."""
    folder = tmp_path_factory.mktemp("build")
    shutil.copytree(ROOT, folder / "source", ignore=LEFTOVERS)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist")]
    done = subprocess.run(
        [*command, str(folder / "source")], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel installed into a folder of its own; what it needs comes from this Python."""
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target"]
    done = subprocess.run(
        [*command, str(site), str(wheel)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return site


def run_installed(site: Path, cwd: Path, *args: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(site)}
    command = [sys.executable, *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd, env=env)


def test_its_name_and_version(wheel: Path) -> None:
    assert wheel.name == f"edgesight-{edgesight.__version__}-py3-none-any.whl"
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert f"## [{edgesight.__version__}]" in changes


def test_everything_that_the_package_is_made_of_is_in_it(names: set[str]) -> None:
    rooms = ("models", "compression", "deploy", "device_app")
    kinds = {".py", ".onnx", ".jpg", ".html", ".css", ".js", ".j2", ".svg"}
    wanted = {
        f"edgesight/{file.relative_to(ROOT).as_posix()}"
        for room in rooms
        for file in (ROOT / room).rglob("*")
        if file.suffix in kinds and "__pycache__" not in file.parts
    }
    wanted |= {"edgesight/__init__.py", "edgesight/__main__.py", "edgesight/py.typed"}
    assert wanted <= names, f"not in the wheel: {sorted(wanted - names)}"


def test_what_the_main_job_needs_is_in_it(names: set[str]) -> None:
    def some(pattern: str) -> list[str]:
        return [name for name in names if re.fullmatch(pattern, name)]

    assert "edgesight/models/zoo/edgesight_nano.onnx" in names
    assert some(r"edgesight/models/zoo/NOTICE.*")
    assert len(some(r"edgesight/device_app/samples/\w+\.jpg")) >= 4
    assert some(r"edgesight/device_app/samples/ATTRIBUTION\.md")
    assert some(r"edgesight/device_app/web/.*\.html")
    assert some(r"edgesight-.*\.dist-info/licenses/NOTICE")
    assert some(r"edgesight-.*\.dist-info/licenses/LICENSE")


def test_every_sample_is_attributed() -> None:
    photos = sorted(file.name for file in (ROOT / "device_app" / "samples").glob("*.jpg"))
    assert photos
    for text in (
        (ROOT / "device_app" / "samples" / "ATTRIBUTION.md").read_text(),
        (ROOT / "NOTICE").read_text(),
    ):
        assert sorted(set(re.findall(r"[a-z]+\.jpg", text)) & set(photos)) == photos


def test_nothing_else_is_in_it(names: set[str]) -> None:
    top = {name.split("/")[0] for name in names}
    assert top == {"edgesight", f"edgesight-{edgesight.__version__}.dist-info"}
    rooms = {name.split("/")[1] for name in names if name.startswith("edgesight/")}
    assert rooms == {
        "__init__.py",
        "__main__.py",
        "py.typed",
        "models",
        "compression",
        "deploy",
        "device_app",
    }
    assert "edgesight/compression/__init__.py" not in names


def test_the_wheel_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size < 10e6


def test_the_source_archive_can_build_it(built: Path) -> None:
    """The wheel came from the archive, so only what a reader of the archive needs is looked at."""
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "NOTICE"} <= names


def test_the_command_is_there(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("entry_points.txt")]
        parser = configparser.ConfigParser()
        parser.read_string(archive.read(name).decode())
    assert dict(parser["console_scripts"]) == {"edgesight": "edgesight.__main__:main"}


def test_the_wheel_is_what_runs(installed: Path, tmp_path: Path) -> None:
    done = run_installed(installed, tmp_path, "-c", "import edgesight; print(edgesight.__file__)")
    assert Path(done.stdout.strip()).is_relative_to(installed), done.stderr
    done = run_installed(installed, tmp_path, str(installed / "bin" / "edgesight"), "--version")
    assert done.stdout == f"edgesight {edgesight.__version__}\n"


def test_the_main_job_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    """A newcomer's first command, with the shipped model and samples, and no torch."""
    code = (
        "import sys\n"
        "for blocked in ('torch', 'onnx', 'pydantic', 'jinja2', 'matplotlib'):\n"
        "    sys.modules[blocked] = None\n"
        "from edgesight.__main__ import main\n"
        "sys.exit(main(['run', '--frames', '20', '--display', 'none', '--json']))\n"
    )
    done = run_installed(installed, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["frames"] == 20
    assert {"fps", "stages", "accuracy"} <= set(summary)
    assert list(tmp_path.iterdir()) == []


def test_the_install_without_our_opencv_names_all_that_the_package_needs() -> None:
    """README's line for Jetson and Raspberry Pi: ``--no-deps``, and then the rest by hand."""
    import re

    root = Path(__file__).parents[1]
    text = (root / "pyproject.toml").read_text()
    wanted = set(
        re.findall(
            r'^    "([\w-]+)', text.partition("dependencies = [")[2].partition("\n]")[0], re.M
        )
    )
    block = (root / "README.md").read_text().partition("--no-deps .")[2].partition("```")[0]
    missing = {name for name in wanted if name not in block}
    assert missing == {"numpy", "opencv-python-headless"}, "the system brings these two"
