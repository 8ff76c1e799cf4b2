"""Where a start of a run begins: at its own newest good checkpoint, at another run's, or from nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ling.checkpoint.control import Control
from ling.checkpoint.folder import (
    DamagedCheckpointError,
    checkpoints,
    damaged_folders,
    find_damage,
    read_manifest,
    resolve,
    set_aside,
    step_folders,
)
from ling.checkpoint.names import scalars_kind
from ling.config import Config, UserError
from ling.config.load import from_dict
from ling.config.report import diff, shown
from ling.model.counts import parameter_shapes

_SHOWN = 3


@dataclass(frozen=True)
class Start:
    """The checkpoint that a start of a run begins with.

    Attributes:
        is_own: it is the run's own, which goes on with everything; else `checkpoint.load` named it.
        step: of the run when it begins.
    """

    folder: Path
    is_own: bool
    step: int


def find_start(
    config: Config, run_dir: Path, announce: Callable[[str], None], control: Control | None = None
) -> Start | None:
    """Choose the checkpoint to begin with; all ranks call it, and share the work of reading the files.

    A run with checkpoints of its own resumes from the newest good one, and ignores `checkpoint.load`. Damaged ones are
    named and set aside.

    Raises:
        UserError: the run has checkpoints, but none is good; or that of `checkpoint.load` is not.
    """
    settings, control = config.checkpoint, control or Control()
    folder = newest_good(run_dir, settings.verify, announce, control)
    if folder is not None:
        if settings.load is not None:
            announce(f"checkpoint.load={settings.load} is ignored: the run has checkpoints of its own")
        return Start(folder, True, read_manifest(folder, "never").step)
    if settings.load is None:
        return None
    folder = resolve(Path(settings.load))
    problem = damage(folder, settings.verify, control)
    if problem:
        raise UserError(f"checkpoint.load: {folder} is damaged: {problem}; name another checkpoint")
    manifest = read_manifest(folder, "never")
    changed = differences(from_dict(manifest.config, str(folder)), config)
    if changed:
        announce(f"other than in {folder}: {', '.join(changed)}")
    return Start(folder, False, manifest.step if settings.load_step else 0)


def newest_good(
    run_dir: Path, verify: str, announce: Callable[[str], None], control: Control | None = None
) -> Path | None:
    """The newest checkpoint of a run that is whole; those found damaged on the way are renamed. All ranks call it.

    Raises:
        UserError: there are checkpoints, and all are damaged; or one was written by a newer ling.
    """
    control, found_damaged = control or Control(), []
    candidates = control.from_main(lambda: [path for _, path in step_folders(run_dir)])
    for folder in reversed(candidates):
        problem = damage(folder, verify, control)
        if problem is None:
            return folder
        kept = control.from_main(lambda folder=folder: set_aside(folder))  # type: ignore[misc]
        announce(f"warning: {folder} is damaged: {problem}; kept as {kept.name}")
        found_damaged.append(kept)
    earlier = control.from_main(lambda: damaged_folders(run_dir))
    if found_damaged or earlier:
        raise UserError(
            f"{run_dir} has no good checkpoint left, only {', '.join(path.name for path in found_damaged or earlier)}; "
            "give another run.dir to begin anew"
        )
    return None


def damage(folder: Path, verify: str, control: Control) -> str | None:
    """What is wrong with a checkpoint, or None; the ranks share its files between them. All ranks call it.

    Raises:
        UserError: it was written by a newer ling.
    """
    try:
        manifest = control.from_main(lambda: read_manifest(folder, "never"))
    except DamagedCheckpointError as error:
        return error.problem
    if verify == "never":
        return None
    mine = sorted(manifest.files)[control.rank :: control.size]
    problems = control.everyone(find_damage(folder, manifest, mine, checksums=verify == "always"))
    return next((problem for problem in problems if problem), None)


def check_start(config: Config, run_dir: Path) -> None:
    """Before ranks are started: see that the checkpoint which they would begin with fits this run's model.

    Raises:
        UserError: there is no such checkpoint, its files have other sizes than they should, or its tensors are others.
    """
    folder = next((path for _, path in reversed(checkpoints(run_dir)) if _is_plausible(path)), None)
    is_own = folder is not None
    if folder is None:
        if config.checkpoint.load is None:
            return
        folder = resolve(Path(config.checkpoint.load))
    manifest = read_manifest(folder)
    problems = shape_differences(from_dict(manifest.config, str(folder)), config)
    if problems:
        more = f" (and {len(problems) - _SHOWN} more)" if len(problems) > _SHOWN else ""
        raise UserError(
            f"{folder} does not fit this run's model: {'; '.join(problems[:_SHOWN])}{more}; "
            "set the model as it was, or load another checkpoint"
        )
    if not is_own and config.checkpoint.load_optimizer and manifest.optimizer_step is None:
        raise UserError(f"{folder} has no optimizer state; set checkpoint.load_optimizer=false")


def differences(saved: Config, config: Config) -> list[str]:
    """What another run's checkpoint was made with and this run does otherwise, as far as it concerns the weights."""
    return [
        f"{key}={shown(now)} (it was {shown(before)})"
        for key, before, now in diff(saved, config)
        if key.startswith("model.") or key in ("precision.recipe", "data.train", "data.tokenizer")
    ]


def _is_plausible(folder: Path) -> bool:
    try:
        read_manifest(folder)
    except DamagedCheckpointError:
        return False
    return True


def shape_differences(saved: Config, config: Config) -> list[str]:
    """Parameters that two models do not share, in the order of the model; an activation may have scalars of its own."""
    before, now = (
        {name: shape for name, shape in parameter_shapes(model).items() if scalars_kind(name) is None}
        for model in (saved.model, config.model)
    )
    problems = []
    for name in dict.fromkeys([*now, *before]):
        if name not in before:
            problems.append(f"{name} is missing in it")
        elif name not in now:
            problems.append(f"{name} is not in this model")
        elif before[name] != now[name]:
            problems.append(f"{name} has the shape {list(before[name])}, here {list(now[name])}")
    return problems
