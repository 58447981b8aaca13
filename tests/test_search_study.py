"""The study of a search: it goes on after a kill, can be shared, and is not taken for another."""

from __future__ import annotations

import json
import re
import runpy
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from edgesight.compression import candidates as candidates_module
from edgesight.compression.search import read_trials
from edgesight.models.errors import RecipeError

kit: Any = runpy.run_path(str(Path(__file__).with_name("search_kit.py")))
recipe_of, run = kit["recipe_of"], kit["run"]
tiny_net = kit["tiny_net"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos."""
    folder = tmp_path_factory.mktemp("search")
    kit["tools"]["draw_photos"](folder / "photos")
    return folder


def test_going_on_does_not_repeat_finished_trials(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(recipe_of(base, "more", trials=2, cost_max=0.75))
    logs = {path: path.stat().st_mtime_ns for path in (base / "more/trials").glob("*.json")}
    done: list[str] = []
    real = candidates_module.run_step

    def spied(state: Any, settings: Any, *rest: Any) -> Any:
        result = real(state, settings, *rest)
        if not result[2]:
            done.append(str(state.job.step_folder))
        return result

    monkeypatch.setattr(candidates_module, "run_step", spied)
    same = run(recipe_of(base, "more", trials=2, cost_max=0.75))
    assert not done, "nothing is left to do"
    assert same["search"]["best"] == first["search"]["best"]
    more = run(recipe_of(base, "more", trials=3, cost_max=0.75))
    assert len(read_trials(base / "more")) == more["search"]["trials"] == 3
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in logs.items())
    assert len(done) == len(set(done))
    other = run(recipe_of(base, "more", trials=1, bytes_max="1 MB"))
    assert other["search"]["trials"] == 1, "another target is another study"


def test_after_a_kill_the_trial_is_ended_and_no_other_done_again(base: Path) -> None:
    more = {"trials": 2, "cost_max": 1.0, "passes": 2400, "kinds": ["distill", "quantize"]}
    file = kit["write_recipe"](base / "kill.toml", "killed", **more)
    out = base / "killed"
    with kit["start_process"](base, file, base / "package") as process:
        end = time.monotonic() + 240
        while not list(out.glob("steps/1-distill-*")) and time.monotonic() < end:
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    before = {path: path.stat().st_mtime_ns for path in (out / "trials").glob("*.json")}
    assert [path.name for path in before] == ["0000.json"], "killed in the second trial"
    assert list((out / "trials").glob(".*.lock")), "the process could not tidy up"
    assert not (out / "model.onnx").exists()
    result = run(recipe_of(base, "killed", **more))
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
    first, again = read_trials(out)
    assert (first["trial"], again["trial"]) == (0, 1)
    kinds = [step["kind"] for step in again["candidates"][0]["steps"]]
    assert kinds == ["distill", "quantize"], "the same choices"
    assert result["search"]["trials"] == 2
    assert not list((out / "trials").glob(".*.lock"))


def test_two_processes_share_a_study(base: Path) -> None:
    more = {"trials": 4, "cost_max": 1.0}  # the one that ends first has met it, too
    file = kit["write_recipe"](base / "two.toml", "two", **more)
    both = [kit["start_process"](base, file, base / "package") for _ in range(2)]
    ends = [process.communicate(timeout=280) for process in both]
    assert [process.returncode for process in both] == [0, 0], [e for _, e in ends]
    workers = [
        {int(n) for n in re.findall(r"^trial (\d+)\.1:", errors, re.M)} for _, errors in ends
    ]
    assert not workers[0] & workers[1], "no trial is done twice"
    assert sorted(workers[0] | workers[1]) == [t["trial"] for t in read_trials(base / "two")]
    assert len(workers[0] | workers[1]) == 4
    last = json.loads((base / "two" / "frontier.json").read_text())
    assert last["trials"] == 4
    assert last["met"]


def test_restart_begins_anew_but_not_with_a_study_that_others_may_use(base: Path) -> None:
    recipe = recipe_of(base, "anew", trials=1, cost_max=0.75, kinds=["quantize"])
    run(recipe)
    (log,) = (base / "anew/trials").glob("*.json")
    stamp = log.stat().st_mtime_ns
    run(recipe, restart=True)
    assert log.stat().st_mtime_ns != stamp
    shared = f"sqlite:///{base / 'shared.sqlite'}"
    with pytest.raises(RecipeError, match="may be shared"):
        run(recipe_of(base, "anew", trials=1, cost_max=0.75, storage=shared), restart=True)


def test_a_study_of_something_else_is_refused(base: Path) -> None:
    place = {"storage": f"sqlite:///{base / 'named.sqlite'}", "study": "mine"}
    one = {"kinds": ["quantize"], "trials": 1}
    run(recipe_of(base, "named", cost_max=1.0, **one, **place))
    with pytest.raises(RecipeError, match="'mine' is of others; name another one"):
        run(recipe_of(base, "named", cost_max=0.9, **one, **place))


@pytest.mark.parametrize("storage", ["nosuch://u:secret@host/x", "no address", "sqlite:////no/x"])
def test_a_place_that_cannot_be_used_is_refused_in_one_line(base: Path, storage: str) -> None:
    with pytest.raises(RecipeError, match=r"search\.storage: expected an address") as caught:
        run(recipe_of(base, "nowhere", trials=1, cost_max=0.75, storage=storage))
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
