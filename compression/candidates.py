"""Makes and measures the models that a search proposes; what was made before is not made again."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..models.dataset import open_dataset
from ..models.errors import DatasetError, ModelFileError, OutputError, RecipeError
from ..models.files import read_json, sha256, write_json
from ..models.graph import load_model, node_macs
from .data import open_photos, refuse_overlap
from .pipeline import STEPS_FOLDER, Ruler, digest_of, first_state, run_step, step_key
from .price import Price, price_for
from .recipe import Recipe
from .settings import STEP_KINDS, VerifyStep
from .source import Entered, enter
from .space import recipe_text, same_recipe
from .state import Job, State
from .steps import with_file
from .targets import Figures

HOLD_OUT = 5
"""Every fifth photo is the tuning part, on which a search compares models; unless a recipe says."""
TUNED_FILE = "tuned.json"
CANDIDATE_FILE = "candidate.json"
LOCK_FILE = ".lock"
ORIGINAL = "original"


@dataclass(frozen=True)
class Candidate:
    """A finished model of a search.

    Attributes:
        name: ``original``, or trial and rung as ``12.3``.
        input_hw: Height and width of its input in pixels.
        steps: Settings of its steps, in order.
        score: ``measure.Score`` as JSON on the tuning photos.
        loss: Points of accuracy below the original there; 100 if unknown.
        cost: In the unit of ``Price``.
        cost_ratio: Of the original's.
        bytes: Of the file.
        macs: Multiply-accumulates per picture.
        file: Relative to the folder of results.
        sha256: Of the file.
    """

    name: str
    input_hw: tuple[int, int]
    steps: tuple[dict[str, Any], ...]
    score: dict[str, Any]
    loss: float
    cost: float
    cost_ratio: float
    bytes: int
    macs: int
    file: str
    sha256: str

    @property
    def figures(self) -> Figures:
        """What it is judged by."""
        return Figures(self.loss, self.cost_ratio, self.bytes)

    @property
    def recipe_key(self) -> str:
        """A text that only candidates of the same recipe share."""
        return same_recipe(self.input_hw, self.steps)

    @property
    def text(self) -> str:
        """Its recipe in a few words."""
        return recipe_text(self.input_hw, self.steps)

    def to_json(self) -> dict[str, Any]:
        """Returns it as a JSON-ready dict."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Candidate:
        """Returns what ``to_json`` gave."""
        lists = {"input_hw": tuple(values["input_hw"]), "steps": tuple(values["steps"])}
        return cls(**values | lists)


def lost_points(score: dict[str, Any], original: dict[str, Any]) -> float:
    """Returns points of accuracy below the original; 100 if unknown.

    With boxes that is what the paired comparison says; without, agreement is missing, of which the
    original may itself have less than 100 %: it finds some things twice.
    """
    if score["kind"] == "ap":
        return 100.0 if score["loss"] is None else float(score["loss"])
    return 100.0 if score["value"] is None else float(original["value"] - score["value"])


class Workshop:
    """Makes and measures the models of one search.

    The photos of ``data.eval`` are only looked up by name: nobody may learn from them, and a
    search may not see them.

    Args:
        recipe: With a ``[search]`` table.
        progress: Show bars.

    Raises:
        EdgeSightError: Something that the recipe names is wrong.
    """

    def __init__(self, recipe: Recipe, progress: bool = True) -> None:
        assert recipe.search is not None
        changes: dict[str, Any] = {"hold_out": recipe.data.hold_out or HOLD_OUT}
        self.hold_out: int = changes["hold_out"]
        self.eval_folder = recipe.data.eval
        self.budget_s = recipe.search.budget_s
        data = recipe.data.model_copy(update=changes | {"eval": None})
        self.recipe = recipe.model_copy(update={"data": data, "search": None})
        self.progress = progress
        self.photos = open_photos(data.photos, None, self.hold_out)
        if recipe.data.eval is not None:
            apart = open_dataset(recipe.data.eval)
            apart.labels()
            refuse_overlap([*self.photos.train, self.photos.check], apart)
        self.entered: Entered = enter(recipe.model, recipe.seed)
        self.job = Job(
            recipe.out,
            self.photos,
            recipe.target.core,
            recipe.seed,
            progress,
            recipe.search.tune_photos,
        )
        self.start: State = first_state(self.job, self.entered, None)
        check = self.photos
        self.ruler = Ruler(self.start, check.check, check.check_print, recipe.search.tune_photos)
        self.digest = digest_of(
            self.entered.digest,
            self.entered.spec.to_json(),
            self.photos.train_print,
            self.ruler.key,
            recipe.target.core,
            recipe.seed,
        )

    def price_with(self, kind: str | None) -> None:
        """Chooses how costs are told: the best way, or the one that a study began with.

        Raises:
            RecipeError: The one that a study began with is not to be had here.
        """
        self.price: Price = price_for(self.job.core, kind, self.budget_s)
        self.whole_cost = self.price.of(self.start.original)
        if self.whole_cost <= 0:
            message = f"{self.entered.spec.name}: expected a model that costs something, found 0"
            raise ModelFileError(message)

    def original(self) -> Candidate:
        """Measures the original.

        Raises:
            DatasetError: It sees nothing on the tuning photos, so nothing can be compared.
        """
        score = self.ruler.measure(self.start, None)
        if score is None or score["value"] is None or score["value"] == 0:
            message = (
                f"expected photos on which {self.entered.spec.name} finds something, found none "
                f"among the {len(self.photos.check)} to compare models on; check photos and classes"
            )
            raise DatasetError(message)
        self.whole_score = score
        return self._candidate(ORIGINAL, self.entered.spec.input_hw, (), self.start.original, score)

    def settings(
        self, hw: tuple[int, int], steps: Sequence[dict[str, Any]], verify: VerifyStep | None = None
    ) -> Recipe:
        """Returns the recipe of a candidate.

        Raises:
            RecipeError: A step's settings are impossible.
        """
        try:
            made = [STEP_KINDS[step["kind"]].model_validate(step) for step in steps]
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            message = f"{where}: {first['msg']}, found {first['input']!r}"
            raise RecipeError(message) from None
        size = None if hw == self.entered.spec.input_hw else hw
        data = self.recipe.data.model_copy(update={"input_hw": size})
        last = [] if verify is None else [verify]
        return self.recipe.model_copy(update={"steps": (*made, *last), "data": data})

    def make(
        self,
        name: str,
        hw: tuple[int, int],
        steps: Sequence[dict[str, Any]],
        say: Callable[[str], None],
    ) -> Candidate:
        """Makes a model and measures it on the tuning photos.

        Args:
            name: Of the candidate.
            hw: Height and width of its input in pixels.
            steps: Settings of its steps.
            say: Told what is going on.

        Raises:
            RecipeError: It cannot be made.
            ModelFileError: The same.
        """
        if not steps and hw == self.entered.spec.input_hw:
            return replace(self.original(), name=name)
        recipe, photos = self.settings(hw, steps), self.photos
        keys = [
            step_key(recipe, i, self.entered, photos.train_print, photos.check_print)
            for i in range(len(steps))
        ]
        folders = [
            self._folder(f"{i + 1}-{step['kind']}-{key[:10]}")
            for i, (step, key) in enumerate(zip(steps, keys, strict=True))
        ]
        last = folders[-1] if folders else self._folder(f"0-size-{hw[0]}x{hw[1]}")
        key = digest_of(keys, hw, self.ruler.key, self.price.kind, self.entered.digest)
        if (known := self._known(last / CANDIDATE_FILE, key)) is not None:
            return replace(known, name=name)
        state = first_state(self.job, self.entered, recipe.data.input_hw)
        for i, settings in enumerate(recipe.steps):
            inside = replace(state, job=replace(self.job, step_folder=folders[i]))
            title = f"  {name}: {settings.kind}"
            with locked(folders[i] / LOCK_FILE):
                state, _, _ = run_step(inside, settings, keys[i], title, _unless_done(say))
        with locked(last / LOCK_FILE):
            state = with_file(replace(state, job=replace(self.job, step_folder=last)))
            assert state.model is not None
            score = self.ruler.measure(state, last / TUNED_FILE)
            assert score is not None
            made = self._candidate(name, hw, steps, state.model, score)
            write_json(last / CANDIDATE_FILE, {"key": key, "candidate": made.to_json()})
        return made

    def _candidate(
        self,
        name: str,
        hw: tuple[int, int],
        steps: Sequence[dict[str, Any]],
        path: Path,
        score: dict[str, Any],
    ) -> Candidate:
        cost = self.price.of(path)
        return Candidate(
            name,
            hw,
            tuple(steps),
            score,
            lost_points(score, self.whole_score),
            cost,
            cost / self.whole_cost,
            path.stat().st_size,
            sum(node_macs(load_model(path)).values()),
            path.relative_to(self.job.folder).as_posix(),
            sha256(path),
        )

    def _known(self, path: Path, key: str) -> Candidate | None:
        stored = read_json(path)
        try:
            if stored["key"] != key:
                return None
            found = Candidate.from_json(stored["candidate"])
            same = sha256(self.job.folder / found.file) == found.sha256
        except (KeyError, TypeError, OSError):
            return None
        return found if same else None

    def _folder(self, name: str) -> Path:
        return self.job.folder / STEPS_FOLDER / name


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Holds a file that only one process can hold; the system frees it when the process dies.

    Args:
        path: Of the file; it is made, and stays.
        wait: Until it is free.

    Yields:
        Whether this process holds it now.

    Raises:
        OutputError: The file cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        message = f"cannot write {path}: {error.strerror}; free space or choose another place"
        raise OutputError(message) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def _unless_done(say: Callable[[str], None]) -> Callable[[str], None]:
    return lambda line: None if line.endswith("done before") else say(line)
