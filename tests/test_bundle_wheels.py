"""The wheels of an ``--offline`` bundle: chosen for the board's Python, and edgesight's own."""

from __future__ import annotations

import platform
import re
import runpy
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from edgesight import __version__
from edgesight.deploy import bundle_wheels, own_wheel
from edgesight.deploy.bundle_open import open_bundle
from edgesight.models.errors import InputError

kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("bundle_kit.py"))))
ARM311 = "cp311-cp311-manylinux_2_28_aarch64"
ANY = "py3-none-any"


def wheel(folder: Path, name: str, version: str, tag: str = ANY, needs: Sequence[str] = ()) -> Path:
    """Writes a small real wheel."""
    info = f"{name}-{version}.dist-info"
    text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    text += "".join(f"Requires-Dist: {need}\n" for need in needs)
    form = f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n"
    files = {f"{name}.py": b"x = 1\n", f"{info}/METADATA": text.encode()}
    files[f"{info}/WHEEL"] = form.encode()
    folder.mkdir(exist_ok=True)
    own_wheel.write_wheel(folder / f"{name}-{version}-{tag}.whl", files)
    return folder / f"{name}-{version}-{tag}.whl"


@pytest.fixture
def few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of small wheels, and an edgesight that needs them alone."""
    folder = tmp_path / "wheels"
    wheel(folder, "fast", "1.0", "cp310-cp310-manylinux2014_aarch64")
    wheel(folder, "fast", "1.1", ARM311)
    wheel(folder, "fast", "1.2", "cp311-cp311-manylinux_2_28_x86_64")
    wheel(folder, "fast", "1.3", "cp311-cp311-manylinux_2_39_aarch64")
    old, new = (f"python_version {sign} '3.11'" for sign in ("<", ">="))
    wheel(folder, "plain", "2.0", needs=[f"old; {old}", f"new; {new}", "odd; extra == 'more'"])
    wheel(folder, "old", "1.0", needs=["older"])
    wheel(folder, "older", "1.0")
    wheel(folder, "new", "1.0")
    wheel(folder, "edgesight", __version__)
    needs = ("fast>=1", "plain", f"tomli>=2; {old}")
    monkeypatch.setattr(bundle_wheels, "base_requirements", lambda: needs)
    wheel(folder, "tomli", "2.0.1")
    return folder


@pytest.mark.parametrize(
    ("target", "pins"),
    [
        ("pi-bookworm", "edgesight fast==1.1 new==1.0 plain==2.0"),
        ("aarch64/py310", "edgesight fast==1.0 old==1.0 older==1.0 plain==2.0 tomli==2.0.1"),
        ("x86_64/py311", "edgesight fast==1.2 new==1.0 plain==2.0"),
    ],
)
def test_wheels_fit_the_board_and_not_this_machine(
    target: str, pins: str, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle_wheels, "CONSTRAINTS", {})
    place = tmp_path / "place"
    place.mkdir()
    found = bundle_wheels.gather(bundle_wheels.parse_target(target), place, few)
    wanted = [pin.replace("edgesight", f"edgesight=={__version__}") for pin in pins.split()]
    assert list(found.requirements) == wanted
    assert sorted(place.iterdir()) == sorted(found.files)


def test_preset_keeps_what_its_apt_packages_need(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """picamera2's parts on Debian 12 die with numpy 2."""
    for version in ("1.26.4", "2.1.0"):
        wheel(few, "numpy", version, ARM311)
    wheel(few, "opencv_python_headless", "4.11.0", needs=["numpy"])
    wheel(few, "opencv_python_headless", "5.0.0", needs=["numpy"])
    needs = ("numpy>=1.24", "opencv-python-headless>=4.6")
    monkeypatch.setattr(bundle_wheels, "base_requirements", lambda: needs)
    for target, pins in (
        ("pi-bookworm", ["numpy==1.26.4", "opencv-python-headless==4.11.0"]),
        ("aarch64/py311", ["numpy==2.1.0", "opencv-python-headless==5.0.0"]),
    ):
        place = tmp_path / target.replace("/", "-")
        place.mkdir()
        found = bundle_wheels.gather(bundle_wheels.parse_target(target), place, few)
        assert list(found.requirements[1:]) == pins


def test_offline_bundle_installs_without_a_network(
    few: Path,
    tmp_path: Path,
    tiny_onnx: Any,
    tiny_spec: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tag = f"cp3{sys.version_info.minor}"
    wheel(few, "fast", "1.4", f"{tag}-{tag}-manylinux_2_17_x86_64")
    wheel(few, "fast", "1.5", f"{tag}-{tag}-manylinux_2_17_aarch64")
    machine = platform.machine()
    target = f"{machine}/py3{sys.version_info.minor}"
    out = tmp_path / "off.esbundle"
    model = tiny_onnx(spec=tiny_spec)
    words = [model, "-o", out, "--offline", "--target", target, "--wheels", few]
    assert kit.run(words, monkeypatch) == 0
    first = out.read_bytes()
    assert kit.run(words, monkeypatch) == 0
    assert out.read_bytes() == first
    bundle = open_bundle(out)
    assert bundle.manifest.target is not None
    assert bundle.manifest.target.machine == machine
    folder = bundle.extract(tmp_path / "out")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--quiet", "--target", site]
    command += ["--find-links", folder / "wheels", *bundle.manifest.requirements]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (site / "fast.py").is_file()


@pytest.mark.parametrize(
    ("take_away", "target", "said"),
    [
        ("fast-*", "pi-bookworm", "pi-bookworm (Python 3.11, aarch64), pip found:"),
        ("old-*", "aarch64/py310", "aarch64/py310 (Python 3.10, aarch64), pip found:"),
    ],
)
def test_missing_wheel_is_one_line_and_no_bundle(
    take_away: str,
    target: str,
    said: str,
    few: Path,
    tmp_path: Path,
    tiny_onnx: Any,
    tiny_spec: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(bundle_wheels, "CONSTRAINTS", {})
    for path in few.glob(take_away):
        path.unlink()
    out = tmp_path / "off.esbundle"
    words = [tiny_onnx(spec=tiny_spec), "-o", out, "--offline", "--target", target]
    assert kit.run([*words, "--wheels", few], monkeypatch) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not out.exists()
    assert kit.run([*words, "--wheels", tmp_path / "none"], monkeypatch) == 2
    assert "--wheels: expected a folder" in capsys.readouterr().err


def test_file_that_is_no_wheel_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x-1-py3-none-any.whl").write_bytes(b"no zip")
    with pytest.raises(InputError, match="expected a wheel, found none"):
        bundle_wheels.read_wheel(tmp_path / "x-1-py3-none-any.whl")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """edgesight's own wheel, as a checkout gives it."""
    return own_wheel.own_wheel(tmp_path_factory.mktemp("own"))


def test_own_wheel_of_a_checkout_is_whole_and_always_the_same(built: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(built) as archive:
        names = archive.namelist()
        assert archive.testzip() is None
        metadata = next(archive.read(n).decode() for n in names if n.endswith("/METADATA"))
    assert "edgesight/models/zoo/edgesight_nano.onnx" in names
    assert [n for n in names if n.startswith("edgesight/device_app/web/") and n.endswith(".html")]
    assert not [n for n in names if "tests" in n or n.endswith(".pyc") or "/runs/" in n]
    needs = re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE)
    for need in own_wheel.base_requirements():
        assert re.split(r"[<>=!;]", need)[0] in " ".join(needs)
    assert own_wheel.own_wheel(tmp_path).read_bytes() == built.read_bytes()


def test_installed_edgesight_packs_its_own_wheel_again(built: Path, tmp_path: Path) -> None:
    """From the files on the disk, without an index: there that name may be anybody's."""
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet"]
    command += ["--target", str(site), str(built)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (tmp_path / "new").mkdir()
    code = (
        "import sys; from pathlib import Path; from edgesight.deploy import own_wheel as o\n"
        "assert str(o.PACKAGE).startswith(sys.argv[1]), o.PACKAGE\n"
        "print(*o.base_requirements(), sep='\\n')\n"
        "try:\n    print(o.own_wheel(Path(sys.argv[2])))\n"
        "except Exception as e:\n    print(type(e).__name__, e)\n"
    )
    words = [sys.executable, "-c", code, str(site), str(tmp_path / "new")]
    environment = {"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}

    def run() -> list[str]:
        found = subprocess.run(
            words, capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path
        )
        assert found.returncode == 0, found.stderr
        return found.stdout.splitlines()

    *needs, path = run()
    assert Path(path).read_bytes() == built.read_bytes()
    names = {re.split(r"[<>=!;\[ ]", need)[0] for need in needs}
    assert names == {re.split(r"[<>=!;\[ ]", n)[0] for n in own_wheel.base_requirements()}
    with (site / "edgesight" / "__main__.py").open("a") as file:
        file.write("print('changed')\n")
    assert "InputError --offline: expected edgesight as it was installed" in run()[-1]
