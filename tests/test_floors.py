"""The house rules that a reader cannot see in one file: who may import whom, and from where."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
ROOMS = ("models", "compression", "deploy", "device_app")
TORCH_FLOORS = ("edgesight.compression", "edgesight.models.nets")
TORCH_PACKAGES = ("torch", "torchvision", "torchao", "onnx2torch", "safetensors")
EXTRA_PACKAGES = (*TORCH_PACKAGES, "onnx", "onnxscript", "pydantic", "jinja2", "matplotlib")
# Whoever stands left may import nothing that stands right; the networks are a floor of their own.
FORBIDDEN = {
    "edgesight.models.nets": ("edgesight.compression", "edgesight.deploy", "edgesight.device_app"),
    "edgesight.models": (
        "edgesight.models.nets",
        "edgesight.compression",
        "edgesight.deploy",
        "edgesight.device_app",
    ),
    "edgesight.compression": ("edgesight.deploy", "edgesight.device_app"),
    "edgesight.deploy": ("edgesight.compression", "edgesight.models.nets"),
    "edgesight.device_app": ("edgesight.compression", "edgesight.models.nets"),
}
FILES = [
    file
    for folder in (ROOT.glob("*.py"), *((ROOT / room).rglob("*.py") for room in ROOMS))
    for file in sorted(folder)
    if "__pycache__" not in file.parts
]


def module_name(file: Path) -> str:
    parts = ("edgesight", *file.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def imports(source: str, name: str, *, is_package: bool = False) -> set[str]:
    """Every module that a source could import, at its top or within its functions."""
    package = name if is_package else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def imported_by(file: Path) -> set[str]:
    return imports(file.read_text(), module_name(file), is_package=file.name == "__init__.py")


def test_the_walk_understands_imports() -> None:
    source = (
        "import numpy.linalg\nfrom ..models.spec import X\nfrom . import a\n"
        "def f():\n    from ...z import b\n"
    )
    found = imports(source, "edgesight.deploy.sub.mod")
    assert {"numpy.linalg", "edgesight.deploy.models.spec", "edgesight.deploy.sub.a"} <= found
    assert "edgesight.z.b" in found
    assert imports("from . import a", "edgesight.models", is_package=True) == {
        "edgesight.models",
        "edgesight.models.a",
    }


def forbidden(importer: str, target: str) -> bool:
    """Whether the first floor that the importer belongs to may not see the target."""
    floors = [floor for floor in FORBIDDEN if within(importer, floor)]
    return bool(floors) and any(within(target, floor) for floor in FORBIDDEN[floors[0]])


def test_the_rule_knows_the_floors() -> None:
    assert forbidden("edgesight.models.spec", "edgesight.deploy.fetch")
    assert forbidden("edgesight.models.spec", "edgesight.models.nets.yolox")
    assert forbidden("edgesight.models.nets.yolox", "edgesight.compression.train")
    assert forbidden("edgesight.deploy.fetch", "edgesight.compression")
    assert forbidden("edgesight.compression.prune", "edgesight.deploy.bench")
    assert forbidden("edgesight.device_app.loop", "edgesight.models.nets.yolox")
    assert not forbidden("edgesight.models.nets.yolox", "edgesight.models.nets.blocks")
    assert not forbidden("edgesight.compression.prune", "edgesight.models.nets.yolox")
    assert not forbidden("edgesight.device_app.loop", "edgesight.models.detector")


def test_no_forbidden_arrow() -> None:
    wrong = [
        f"{module_name(file)} imports {target}"
        for file in FILES
        for target in imported_by(file)
        if forbidden(module_name(file), target)
    ]
    assert not wrong, "\n".join(wrong)


def test_torch_only_in_compression_and_nets() -> None:
    wrong = [
        f"{module_name(file)} imports {target}"
        for file in FILES
        if not any(within(module_name(file), floor) for floor in TORCH_FLOORS)
        for target in imported_by(file)
        if target.split(".")[0] in TORCH_PACKAGES
    ]
    assert not wrong, "\n".join(wrong)


def test_across_rooms_only_relative_imports() -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
        )
        if not getattr(node, "level", 0) and name.split(".")[0] in (*ROOMS, "edgesight")
    ]
    assert not wrong, "\n".join(wrong)


def run_isolated(code: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Runs code in a Python that finds the checkout as ``edgesight``, started elsewhere."""
    (tmp_path / "edgesight").symlink_to(ROOT)
    env = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=elsewhere,
        env=env,
    )


def test_the_torch_free_part_imports_with_only_what_a_board_has(tmp_path: Path) -> None:
    names = [
        name
        for name in map(module_name, FILES)
        if not any(within(name, floor) for floor in TORCH_FLOORS)
    ]
    assert "edgesight.models.detector" in names
    code = (
        "import importlib, sys\n"
        f"for blocked in {EXTRA_PACKAGES!r}: sys.modules[blocked] = None\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
    )
    done = run_isolated(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_does_no_work(tmp_path: Path) -> None:
    code = (
        "import sys, threading\nbefore = set(sys.modules)\nimport edgesight\n"
        "print(sorted(set(sys.modules) - before), threading.active_count())\n"
    )
    done = run_isolated(code, tmp_path)
    assert done.stdout.strip() == "['edgesight'] 1", done.stderr
    assert done.stderr == ""
    tree = ast.parse((ROOT / "__init__.py").read_text())
    assert [type(node) for node in tree.body] == [ast.Expr, ast.Assign]  # docstring, __version__


def test_compression_never_hides_the_standard_librarys() -> None:
    """Python 3.14 has ``compression``; ours must not become a package that is found first."""
    assert not (ROOT / "compression" / "__init__.py").exists()
    assert (ROOT / "compression").is_dir()
    assert not (ROOT / "conftest.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_the_standard_library_works_when_started_in_the_checkout(tmp_path: Path) -> None:
    """What 3.14 does, tried on any Python: a ``compression`` package that comes later on the path.

    A folder with an ``__init__.py`` would win over it and break gzip, bz2 and lzma there.
    """
    (tmp_path / "compression").mkdir()
    (tmp_path / "compression" / "__init__.py").write_text("")
    code = (
        "import sys\n"
        f"sys.path = ['', *sys.path, {str(tmp_path)!r}]\n"
        "import gzip, bz2, lzma, compression\n"
        "print(compression.__file__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    found = Path(done.stdout.strip())
    assert found.name == "__init__.py"
    assert ROOT not in found.parents


def test_every_folder_with_code_is_packaged() -> None:
    packages = set(SETTINGS["tool"]["setuptools"]["packages"])
    with_code = {".".join(("edgesight", *file.relative_to(ROOT).parent.parts)) for file in FILES}
    assert with_code <= packages, f"add to packages in pyproject.toml: {with_code - packages}"
    for package in packages:
        folder = ROOT.joinpath(*package.split(".")[1:])
        assert folder.is_dir(), f"{package} is in pyproject.toml, but {folder} is missing"


def test_the_root_holds_only_the_package_and_its_command() -> None:
    assert sorted(file.name for file in ROOT.glob("*.py")) == ["__init__.py", "__main__.py"]


@pytest.mark.parametrize("folder", [*ROOMS, "tests"])
def test_no_file_is_too_long_to_read(folder: str) -> None:
    long = {
        str(file.relative_to(ROOT)): lines
        for file in (ROOT / folder).rglob("*.py")
        if (lines := len(file.read_text().splitlines())) > 400
    }
    assert not long


def test_only_ssdlite_needs_torchvision() -> None:
    code = (
        "import sys; sys.modules['torchvision'] = None; "
        "from edgesight.models.nets.build import build_net; build_net('yolox_nano'); "
        "import edgesight.compression.steps"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
