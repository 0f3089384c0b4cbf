"""Run a race, so that it can be killed at any moment and goes on where it was, and write what it says."""

import json
import shutil
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from hybridlm.evaluation.runner import earlier_results, writable_folder, write_whole
from hybridlm.evaluation.runs import describe_machine, run_all, write_results

from .arms import Entrant, build_model, enter
from .file import Race, recipe
from .plots import NAMES, draw
from .report import chance_at, judge, recipe_lines, sentences, summarize, winner
from .train import finish, load_weights, logger, weights_path

RESULTS, WINNER = "race.json", "winner"


def run_race(
    race: Race,
    name: str,
    out: str | Path,
    jobs: int = 2,
    tell: Callable[[str], None] | None = None,
    entrants: dict[str, Entrant] | None = None,
) -> dict[str, Any]:
    """Run a race, or the rest of it.

    Args:
        race: From `load_race`.
        name: What the results call it.
        out: Folder for `race.json`, the plots and the winner; runs go into `runs/`.
        jobs: Processes, of one thread each.
        tell: Called with lines: the recipe before the runs start, and where a plot is missing.
        entrants: Of the race, where they are built already.

    Returns:
        What `race.json` holds.

    Raises:
        ValueError: An arm cannot be built or matched, or a number is not allowed.
        FileExistsError: The folder holds the results of another race.
        ChildProcessError: A process was killed.
        OSError: The folder cannot be written to.
    """
    if jobs < 1:
        raise ValueError(f"--jobs: {jobs}, expected at least 1")
    entrants = enter(race) if entrants is None else entrants
    about = describe(race, name, entrants, jobs)
    out = writable_folder(out)
    check_free(out / RESULTS, about)
    started = time.perf_counter()
    folder = out / "runs"
    if tell is not None:
        tell("\n  ".join([f"{name}: {race.title}", *recipe_lines(race, entrants)]))
        tell(f"{len(race.arms)} arms, {race.seeds} seeds, {jobs} processes; finished runs are kept in {folder}")
    found = run_all(partial(finish, race, entrants, folder), list(race.arms), race.seeds, jobs, logger)
    arms = summarize(race, entrants, found)
    ordering = judge(race, arms)
    best, seed = winner(race, arms)
    save_winner(race, entrants[best], folder, best, seed, out / WINNER)
    results = about | {
        "chance": chance_at(race, race.task.length),
        "matched": race.match.what if race.match else None,
        "process_seconds": round(sum(run["process_seconds"] for run in found), 1),
        "seconds": round(time.perf_counter() - started, 1),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "winner": {"arm": best, "seed": seed},
        "arms": arms,
        "ordering": ordering,
        "summary": sentences(race, arms, ordering),
    }
    write_results(out / RESULTS, results, found)
    try:
        draw(race, arms, results["chance"], out)
    except ImportError as error:
        for plot in NAMES:  # those of an earlier state would be taken for this one's
            (out / plot).unlink(missing_ok=True)
        if tell is not None:
            tell(f"{error}; no plot was drawn")
    return results


def describe(race: Race, name: str, entrants: dict[str, Entrant], jobs: int) -> dict[str, Any]:
    """What the figures depend on."""
    said = recipe(race)
    for arm, entrant in entrants.items():
        said["arms"][arm]["config"] = entrant.config
    task = {"task": race.task.name, "length": race.task.length, "options": race.task.options}
    about = {"kind": "race", "name": name, "title": race.title, "task": task, "recipe": said}
    return json.loads(json.dumps(about | {"machine": describe_machine(jobs)}))  # as it is read back


def check_free(path: Path, about: dict[str, Any]) -> None:
    """Refuse to write over the results of another race."""
    before = earlier_results(path)
    if before is None:
        return
    kinds = {False: "a full race", True: "a quick run"}
    found, quick = before.get("recipe"), about["recipe"]["quick"]
    if isinstance(found, dict) and found.get("quick") is (not quick):
        raise FileExistsError(
            f"--out: {path.parent} holds the results of {kinds[not quick]}, and this is {kinds[quick]}; choose another "
            f"folder, or remove {path} first"
        )
    if found != about["recipe"]:
        raise FileExistsError(f"--out: {path} holds the results of another race or recipe; choose another folder")


def save_winner(race: Race, entrant: Entrant, folder: Path, arm: str, seed: int, target: Path) -> None:
    """Write the model of a run as a folder, with the task that `hybridlm eval` scores it on; whole or not at all."""
    model = build_model(race, entrant, seed)
    load_weights(model, weights_path(folder, arm, seed))
    partial_path = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial_path, ignore_errors=True)
    model.eval().save_pretrained(partial_path)
    task = {"task": race.task.name, "length": race.task.length, "options": race.task.options}
    write_whole(partial_path / "task.json", json.dumps(task | {"arm": arm, "seed": seed}, indent=1) + "\n")
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial_path.rename(target)
    shutil.rmtree(old, ignore_errors=True)
