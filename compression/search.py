"""Looks for the combination of steps that meets a target, within a budget, with Optuna.

Each trial is a recipe. It begins with little effort (short training, few photos); one in three goes
on with three times as much. All models, also unfinished ones, are measured on the same photos, so
each of them may turn out to be the best. Several processes, and with ``search.storage`` several
machines, can work on one study. A trial that a killed process has left is taken over.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..models.errors import ModelFileError, RecipeError
from ..models.files import write_json
from .candidates import Candidate, Workshop, locked
from .foreign import ForeignNet
from .levels import layout_of
from .pipeline import STEPS_FOLDER, digest_of
from .settings import STEP_KINDS
from .space import (
    BATCH,
    RATIO,
    SHARES,
    Space,
    draw_recipe,
    first_choices,
    known_kinds,
    recipe_text,
    same_recipe,
    sizes_near,
)
from .steps import STEPS
from .study import STUDY_FILE, open_study, spent_s
from .targets import Search, best_of, excess, merit, objective

if TYPE_CHECKING:
    import optuna

TRIALS_FOLDER: Final = "trials"
LOCK_FILE: Final = ".study.lock"
BUDGET_PARTS: Final = 6
"""The longest training takes about so small a part of the budget."""
PASSES: Final = 2000
PASSES_MIN: Final = 4 * BATCH
PASSES_MAX: Final = 50_000
FAILED_MAX: Final = 5
"""After so many failures and not one success the search gives up."""
FAILED_EXCESS: Final = 100.0
IDLE_MAX: Final = 20
"""After so many trials in a row that made nothing new there is nothing left to try."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Found:
    """What a search has found.

    Attributes:
        original: The detector as it came in.
        candidates: All models made, the original first; of one recipe only one.
        trials: Combinations that were finished or given up.
        failed: Those that could not be made, with the reason.
        seconds: Spent on the study, by all processes; what they did side by side counts once.
        price: What a cost is, for people.
        notes: For the reader.
    """

    original: Candidate
    candidates: tuple[Candidate, ...]
    trials: int
    failed: tuple[str, ...]
    seconds: float
    price: str
    notes: tuple[str, ...] = ()


def search(workshop: Workshop, wanted: Search, say: Say) -> Found:
    """Carries out a search, or goes on with it, until its budget is spent.

    Args:
        workshop: Makes the models.
        wanted: What to look for.
        say: Told what is going on, a line at a time.

    Raises:
        RecipeError: The study cannot be opened or is of something else, or nothing can be made.
        DatasetError: A photo cannot be read.
        OutputError: A result cannot be written.
    """
    worker = uuid.uuid4().hex
    lock = _lock_of(workshop.job.folder, worker)
    with locked(lock):  # as long as it is held, this process is alive
        hunt = _Hunt(workshop, wanted, worker, say)
        hunt.adopt()
        while not hunt.over() and (trial := hunt.next_trial()) is not None:
            hunt.carry_out(trial)
        if not hunt.left:  # else the next process must see who has left them
            lock.unlink(missing_ok=True)
        return hunt.found()


def forget(folder: Path, wanted: Search) -> None:
    """Removes a study and all that was made for it.

    Raises:
        RecipeError: The study is not kept in ``folder``: others may be at work on it.
    """
    if wanted.storage is not None:
        message = (
            "expected a study in the folder of results to begin anew, found one that may be "
            "shared (search.storage); name another one with search.study"
        )
        raise RecipeError(message)
    for name in (TRIALS_FOLDER, STEPS_FOLDER):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / STUDY_FILE).unlink(missing_ok=True)


def _lock_of(folder: Path, worker: str) -> Path:
    return folder / TRIALS_FOLDER / f".{worker}.lock"


class _Hunt:
    """One process at work on a study."""

    def __init__(self, workshop: Workshop, wanted: Search, worker: str, say: Say) -> None:
        self.shop, self.wanted, self.say = workshop, wanted, say
        self.folder = workshop.job.folder
        self.worker = worker
        self.idle = 0
        self.left: list[optuna.Trial] = []
        self.notes: list[str] = []
        self.kinds = self._kinds()
        with locked(self.folder / LOCK_FILE):
            self.study, plan = self._open()
        workshop.price_with(plan["price"])
        self.space = Space(
            self.kinds,
            tuple((h, w) for h, w in plan["sizes"]),
            workshop.entered.spec.input_hw,
            int(plan["passes"]),
            len(workshop.photos.train_paths),
            workshop.job.core,
            wanted.bytes_max,
        )
        with locked(self.folder / LOCK_FILE):
            if not self.study.get_trials(deepcopy=False):
                for values in first_choices(self.space):
                    self.study.enqueue_trial(values)
        self.original = workshop.original()

    def _kinds(self) -> tuple[str, ...]:
        kinds = known_kinds(self.wanted.kinds)
        try:
            layout_of(self.shop.entered.net)
        except ValueError as error:
            if "distill" in kinds:
                self.notes.append(f"without distilling: {error}")
            kinds = tuple(kind for kind in kinds if kind != "distill")
        if not kinds:
            message = (
                f"search.kinds: expected steps that this network can be given, found "
                f"{', '.join(self.wanted.kinds or ())}; name others"
            )
            raise RecipeError(message)
        return kinds

    def _open(self) -> tuple[optuna.Study, dict[str, Any]]:
        """Opens the study; the first process decides what all must have in common."""
        wanted = self.wanted
        digest = digest_of(
            self.shop.digest,
            wanted.model_dump(mode="json", exclude={"budget_s", "trials", "storage", "study"}),
            self.kinds,
        )
        study = open_study(self.folder, wanted, digest, self.shop.recipe.seed)
        plan = study.user_attrs.get("plan")
        if plan is None:
            self.shop.price_with(None)
            plan = {
                "digest": digest,
                "price": self.shop.price.kind,
                "sizes": self._sizes(),
                "passes": self._passes(),
            }
            study.set_user_attr("plan", plan)
            plan = study.user_attrs["plan"]  # of several machines the last one decides
        elif plan["digest"] != digest:
            message = (
                f"search.study: expected a study of this model, these photos and this target, "
                f"found that {study.study_name!r} is of others; name another one"
            )
            raise RecipeError(message)
        return study, plan

    def _sizes(self) -> list[list[int]]:
        whole, fixed = self.shop.entered.spec.input_hw, self.shop.recipe.data.input_hw
        if isinstance(self.shop.entered.net, ForeignNet):
            return [list(whole)]  # the tail of a foreign file knows one size only
        if self.wanted.input_hw is not None:
            return [list(hw) for hw in self.wanted.input_hw]
        return [list(hw) for hw in ([fixed] if fixed else sizes_near(whole))]

    def _passes(self) -> int:
        """Returns how long the longest training may be."""
        if self.wanted.passes is not None:
            return self.wanted.passes
        if self.wanted.budget_s is None or "distill" not in self.kinds:
            return PASSES
        count = 2 * BATCH
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".speed-") as name:
            job = replace(self.shop.job, step_folder=Path(name), progress=False)
            wanted = {"kind": "distill", "photos": count, "batch": BATCH, "labels": "none"}
            settings = STEP_KINDS["distill"].model_validate(wanted)
            state = replace(self.shop.start, job=job)
            STEPS["distill"](state, settings)  # the first one makes the machine ready
            start = time.monotonic()
            STEPS["distill"](state, settings)
            speed = count / (time.monotonic() - start)
        passes = round(speed * self.wanted.budget_s / BUDGET_PARTS)
        passes = min(PASSES_MAX, max(PASSES_MIN, passes))
        self.say(f"training does {speed:.1f} photos/s here: at most {passes} photo passes a model")
        return passes

    def adopt(self) -> None:
        """Takes over the trials that killed processes of this folder have left."""
        import optuna
        from optuna.trial import TrialState

        with locked(self.folder / LOCK_FILE):
            for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                if self._abandoned(trial.user_attrs.get("worker")):
                    mine = optuna.trial.Trial(self.study, trial._trial_id)
                    mine.set_user_attr("worker", self.worker)
                    self.left.append(mine)

    def _abandoned(self, worker: str | None) -> bool:
        """Says whether a process of this folder is gone; of other machines nothing is known."""
        if worker is None:  # killed before it could say who it was
            return self.wanted.storage is None
        lock = _lock_of(self.folder, worker)
        if not lock.is_file():
            return False
        with locked(lock, wait=False) as free:
            if free:
                lock.unlink(missing_ok=True)
            return free

    def over(self) -> bool:
        """Whether the seconds are spent, or there is nothing left to try."""
        budget = self.wanted.budget_s
        return self.idle >= IDLE_MAX or (budget is not None and spent_s(self.study) >= budget)

    def next_trial(self) -> optuna.Trial | None:
        """Goes on with a trial or begins one; None if there have been enough."""
        from optuna.trial import TrialState

        if self.left:
            return self.left.pop(0)
        counted = (TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED)
        with locked(self.folder / LOCK_FILE):
            begun = len(self.study.get_trials(deepcopy=False, states=counted))
            if self.wanted.trials is not None and begun >= self.wanted.trials:
                return None
            trial = self.study.ask()
            trial.set_user_attr("worker", self.worker)
        return trial

    def carry_out(self, trial: optuna.Trial) -> None:
        """Makes the models of a trial, and tells the study."""
        from optuna.trial import TrialState

        known = len(self._candidates())
        self.idle += 1
        try:
            state, last = self._climb(trial)
        except (RecipeError, ModelFileError) as error:  # this combination cannot be made
            self._failed(trial, str(error))
            return
        if len(self._candidates()) > known:
            self.idle = 0
        for name, gap in excess(self.wanted, last.figures).items():
            trial.set_constraint(name, gap)
        if state == TrialState.COMPLETE:
            self.study.tell(trial, objective(self.wanted, last.figures))
        else:
            self.study.tell(trial, state=state)

    def _climb(self, trial: optuna.Trial) -> tuple[optuna.trial.TrialState, Candidate]:
        from optuna.trial import TrialState

        key, made = "", list[Candidate]()
        start = time.monotonic() - float(trial.user_attrs.get("seconds", 0))  # if it was left
        for rung, share in enumerate(SHARES):
            hw, steps = draw_recipe(trial, self.space, share)
            if key == (key := same_recipe(hw, steps)):
                break  # nothing in it grows with the effort
            name = f"{trial.number}.{rung + 1}"
            self.say(f"trial {name}: {recipe_text(hw, steps)}")
            one = self.shop.make(name, hw, steps, self.say)
            made.append(one)
            seconds = time.monotonic() - start
            trial.set_user_attr("candidates", [m.to_json() for m in made])
            trial.set_user_attr("seconds", seconds)
            self._log(trial, made, seconds)
            self.say(f"  {name}: {self._told(one)}")
            trial.report(merit(self.wanted, one.figures), RATIO**rung)
            if rung + 1 < len(SHARES) and trial.should_prune():
                return TrialState.PRUNED, made[-1]
            if self.over():
                break
        return TrialState.COMPLETE, made[-1]

    def _told(self, one: Candidate) -> str:
        figures = one.figures
        return (
            f"{figures.loss:.2f} points lost, {100 * figures.cost:.1f} % of the cost, "
            f"{figures.bytes / 1e6:.3f} MB"
        )

    def _log(self, trial: optuna.Trial, made: list[Candidate], seconds: float) -> None:
        write_json(
            self.folder / TRIALS_FOLDER / f"{trial.number:04}.json",
            {
                "trial": trial.number,
                "choices": trial.params,
                "seconds": round(seconds, 1),
                "candidates": [one.to_json() for one in made],
                "failed": trial.user_attrs.get("failed"),
            },
        )

    def _failed(self, trial: optuna.Trial, reason: str) -> None:
        from optuna.trial import TrialState

        self.say(f"  trial {trial.number} cannot be made: {reason}")
        trial.set_user_attr("failed", reason)
        before = [Candidate.from_json(c) for c in trial.user_attrs.get("candidates", [])]
        self._log(trial, before, float(trial.user_attrs.get("seconds", 0)))
        for name in self.wanted.limits:
            trial.set_constraint(name, FAILED_EXCESS)
        self.study.tell(trial, state=TrialState.PRUNED)
        failed = self._reasons()
        if len(failed) >= FAILED_MAX and len(self._candidates()) == 1:
            message = f"the first {len(failed)} combinations all failed; the last one: {reason}"
            raise RecipeError(message)

    def _reasons(self) -> list[str]:
        trials = self.study.get_trials(deepcopy=False)
        return [str(t.user_attrs["failed"]) for t in trials if "failed" in t.user_attrs]

    def _candidates(self) -> list[Candidate]:
        """Returns all models of the study, the original first; of one recipe the first."""
        found = {self.original.recipe_key: self.original}
        for trial in self.study.get_trials(deepcopy=False):
            for values in trial.user_attrs.get("candidates", ()):
                one = Candidate.from_json(values)
                found.setdefault(one.recipe_key, one)
        return list(found.values())

    def found(self) -> Found:
        """Returns what the study knows."""
        from optuna.trial import TrialState

        candidates = self._candidates()
        best = candidates[best_of(self.wanted, [one.figures for one in candidates])]
        self.say(f"best: {best.name}, {best.text}: {self._told(best)}")
        ended = (TrialState.COMPLETE, TrialState.PRUNED)
        return Found(
            self.original,
            tuple(candidates),
            len(self.study.get_trials(deepcopy=False, states=ended)),
            tuple(self._reasons()),
            spent_s(self.study),
            self.shop.price.text,
            tuple(self.notes),
        )


def read_trials(folder: Path) -> list[dict[str, Any]]:
    """Returns the logs of all trials in a folder of results."""
    return [json.loads(p.read_bytes()) for p in sorted((folder / TRIALS_FOLDER).glob("*.json"))]
