"""What flows from step to step: the networks, what was done to them, and the files made so far.

A changed network is stored as *edits* (data: what was cut) and weights. Edits carried out again on
the uncut network give the shape, the weights fill it, so nothing is ever pickled. The same edits
travel in the metadata of exported float files, which can therefore be compressed further.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.errors import ModelFileError
from ..models.files import atomic_path, sha256, write_json
from ..models.nets.common import DetectorNet
from ..models.spec import ModelSpec
from .activations import replace_activations
from .chain import whole_name, with_chains
from .cut import chosen_groups, cut
from .data import PhotoSet
from .groups import find_groups
from .sparse import mark_sparse

NET_KEY = "edgesight.net"
"""Metadata key of an exported float file: which network it is and how it was changed."""
STATE_VERSION = 1
STATE_FILE = "state.json"
WEIGHTS_FILE = "weights.safetensors"

Edit = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What stays the same during a run.

    Attributes:
        folder: Where results go.
        photos: The photos.
        core: Processor core that the result is for.
        seed: Of everything random.
        progress: Show bars.
        step_photos: Photos that measure the model after each step.
        step_folder: Where the step at work may keep a checkpoint.
    """

    folder: Path
    photos: PhotoSet
    core: str
    seed: int = 0
    progress: bool = True
    step_photos: int = 100
    step_folder: Path = Path()


@dataclass(frozen=True)
class State:
    """The detector between two steps.

    Attributes:
        job: What stays the same.
        teacher: The uncut network, normalisation folded, eval mode.
        teacher_spec: Its spec, at its own input size.
        original: Its ONNX file.
        net: The network as it is now.
        spec: Its spec; the input is float, not folded.
        edits: What was done to ``teacher`` to get the shape of ``net``.
        origin: What to build ``teacher`` from: ``{"net": name, "classes": n}``; empty for others.
        base_edits: Edits that ``teacher`` already had when it came in.
        model: The newest ONNX file; None if ``net`` has changed since.
        float_model: The float file that ``model`` was quantized from.
    """

    job: Job
    teacher: DetectorNet
    teacher_spec: ModelSpec
    original: Path
    net: DetectorNet
    spec: ModelSpec
    edits: tuple[Edit, ...] = ()
    origin: dict[str, Any] = field(default_factory=dict)
    base_edits: tuple[Edit, ...] = ()
    model: Path | None = None
    float_model: Path | None = None

    @property
    def example(self) -> Tensor:
        """An empty picture of the network's size."""
        return torch.zeros(1, 3, *self.spec.input_hw)

    def changed(self, net: DetectorNet, *edits: Edit) -> State:
        """Returns the state after the network has changed; files made before are dropped."""
        return replace(self, net=net, edits=(*self.edits, *edits), model=None, float_model=None)

    def description(self) -> str | None:
        """Returns what goes into an exported file under ``NET_KEY``; None for foreign networks."""
        if not self.origin:
            return None
        edits = [*self.base_edits, *self.edits]
        return describe(str(self.origin["net"]), int(self.origin["classes"]), edits)


@dataclass(frozen=True)
class StepReport:
    """What one step did.

    Attributes:
        kind: Of the step.
        seconds: It took.
        figures: JSON-ready, for people and scripts.
        notes: Sentences for the reader.
    """

    kind: str
    seconds: float
    figures: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def describe(net_name: str, classes: int, edits: Sequence[Edit]) -> str:
    """Returns the text under ``NET_KEY`` that lets an exported float file come in again."""
    values = {"net": net_name, "classes": classes, "edits": list(edits)}  # and "convs" on export
    return json.dumps(values, separators=(",", ":"))


def apply_edits(net: DetectorNet, edits: Sequence[Edit], example: Tensor) -> DetectorNet:
    """Returns a copy of a network with the edits carried out; weights are what is left of its own.

    Raises:
        ModelFileError: The edits are of another network, or of a newer edgesight.
    """
    result = copy.deepcopy(net)
    for edit in edits:
        if edit.get("kind") not in EDITS:
            message = (
                f"expected changes out of {', '.join(EDITS)}, found {edit.get('kind')!r}; the file "
                "is from a newer edgesight: pip install -U edgesight"
            )
            raise ModelFileError(message)
        try:
            result = EDITS[edit["kind"]](result, edit, example)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            message = f"expected changes that fit the network, found: {error}; run it again"
            raise ModelFileError(message) from error
    return result


def _cut(net: DetectorNet, edit: Edit, example: Tensor) -> DetectorNet:
    channels = find_groups(net, example)
    result = cut(net, channels, chosen_groups(channels, edit["removed"]))
    assert isinstance(result, DetectorNet)
    return result


def _sparsify(net: DetectorNet, edit: Edit, example: Tensor) -> DetectorNet:
    mark_sparse(net)  # where the zeros are is in the weights
    return net


def _factorise(net: DetectorNet, edit: Edit, example: Tensor) -> DetectorNet:
    result = with_chains(net, edit["layers"])
    assert isinstance(result, DetectorNet)
    return result


def _activations(net: DetectorNet, edit: Edit, example: Tensor) -> DetectorNet:
    result = replace_activations(net, edit["names"], edit["to"])
    assert isinstance(result, DetectorNet)
    return result


EDITS: dict[str, Callable[[DetectorNet, Edit, Tensor], DetectorNet]] = {
    "activations": _activations,
    "cut": _cut,
    "factorise": _factorise,
    "sparsify": _sparsify,
}
"""Kind of edit -> function that carries it out on a network of the shape before it."""


def rows_kept(dense: nn.Module, edits: Sequence[Edit]) -> dict[str, Tensor]:
    """Returns conv name -> int64 output channels of ``dense`` that are left after all cuts.

    Names are ``whole_name``s. Channels between the factors of a layer are nobody's in ``dense``.
    """
    modules = {whole_name(name): module for name, module in dense.named_modules()}
    kept: dict[str, list[int]] = {}
    for edit in edits:
        for name, gone in edit.get("removed", {}).items():
            name, conv = whole_name(name), modules.get(whole_name(name))
            if conv is None:
                continue
            assert isinstance(conv, nn.Conv2d)
            rows, lost = kept.get(name, list(range(conv.out_channels))), set(gone)
            kept[name] = [row for i, row in enumerate(rows) if i not in lost]
    return {name: torch.tensor(rows) for name, rows in kept.items()}


def weights_digest(net: nn.Module) -> str:
    """Returns the SHA-256 over all names, shapes and values of a network."""
    digest = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_state(folder: Path, key: str, state: State, report: StepReport) -> None:
    """Stores a finished step; ``state.json`` is written last and says that it is finished.

    Raises:
        OutputError: The folder cannot be written.
    """
    from safetensors.torch import save

    data = save({k: v.detach().clone().contiguous() for k, v in state.net.state_dict().items()})
    with atomic_path(folder / WEIGHTS_FILE) as path:
        path.write_bytes(data)
    files = {k: getattr(state, k) for k in ("model", "float_model") if getattr(state, k)}
    write_json(
        folder / STATE_FILE,
        {
            "version": STATE_VERSION,
            "key": key,
            "spec": json.loads(state.spec.to_json()),
            "edits": state.edits,
            "weights_sha256": hashlib.sha256(data).hexdigest(),
            "files": {
                k: {"path": _relative(p, state.job.folder), "sha256": sha256(p)}
                for k, p in files.items()
            },
            "report": {
                "kind": report.kind,
                "seconds": report.seconds,
                "figures": report.figures,
                "notes": report.notes,
            },
        },
    )


def load_state(folder: Path, key: str, before: State) -> tuple[State, StepReport] | None:
    """Returns a step that was finished before; None if it was not, or is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        stored = json.loads((folder / STATE_FILE).read_bytes())
        data = (folder / WEIGHTS_FILE).read_bytes()
        if stored["version"] != STATE_VERSION or stored["key"] != key:
            return None
        if hashlib.sha256(data).hexdigest() != stored["weights_sha256"]:
            return None
        files: dict[str, Path | None] = {"model": None, "float_model": None}
        for name, entry in stored["files"].items():
            files[name] = before.job.folder / entry["path"]
            if sha256(before.job.folder / entry["path"]) != entry["sha256"]:
                return None
        spec = ModelSpec.from_json(json.dumps(stored["spec"]))
        edits = tuple(stored["edits"])
        net = apply_edits(before.teacher, edits, torch.zeros(1, 3, *spec.input_hw))
        weights = load(data)
        for name, module in net.named_modules():
            if isinstance(module, nn.Conv2d) and module.bias is None and f"{name}.bias" in weights:
                module.bias = nn.Parameter(weights[f"{name}.bias"])  # refitting gave it one
        net.load_state_dict(weights)
        report = StepReport(**stored["report"] | {"notes": tuple(stored["report"]["notes"])})
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError):
        return None  # a damaged store is made again
    except ModelFileError:
        return None
    state = replace(before, net=net.eval(), spec=spec, edits=edits, **files)  # type: ignore[arg-type]
    return state, report


def _relative(path: Path, folder: Path) -> str:
    return path.resolve().relative_to(folder.resolve()).as_posix()
