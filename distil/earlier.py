"""What an earlier run left in its folder: its checkpoint, its results, and whether it is the same run."""

from __future__ import annotations

import time
from collections.abc import Set
from pathlib import Path
from typing import Any

import torch

from distil import disk
from distil.command import flag
from distil.disk import Damaged
from distil.machine import rank_0_first, say
from distil.settings import EVALUATION, FREE, Settings, plain, restored


def read_checkpoint(settings: Settings, folder: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """The newest whole checkpoint of a run, or None if it has none. about: `Images.about` of its data.

    ValueError: none is whole (they are kept aside), or it belongs to a run with other settings or data (named).
    OSError: it cannot be read now, and is left as it is.
    """
    found, damage = None, []
    with rank_0_first():
        for path in (folder / "checkpoint.pt", folder / "checkpoint.prev.pt"):
            try:
                found = open_checkpoint(path) if path.exists() and found is None else found
            except Damaged:
                aside = path.with_name(f"{path.name}.broken-{time.strftime('%Y%m%d-%H%M%S')}")
                path.rename(aside)
                damage.append(f"{path} cannot be read (truncated or damaged), so it was moved to {aside}")
    if damage and found is None:
        remedy = f"this run from step 0, or put a good copy at {folder / 'checkpoint.pt'} and it resumes from there"
        raise ValueError(f"{', and '.join(damage)}: the same command now starts {remedy}")
    if found is None:
        return None
    path = folder / ("checkpoint.prev.pt" if damage else "checkpoint.pt")
    kinds = {"step": int, "settings": dict, "students": dict}
    if not isinstance(found, dict) or not all(isinstance(found.get(key), kind) for key, kind in kinds.items()):
        raise ValueError(f"{path} is no checkpoint of train.py: move it away, or give another --out")
    moved = {"data"} if "data" in found else set()  # it is known what the images are, wherever they lie
    refuse_other_settings(settings, found["settings"], path, moved)
    if not 0 <= found["step"] <= settings.steps:
        raise ValueError(f"{path} says step {found['step']} of {settings.steps}: move it away, or give another --out")
    remedy = "bring them back as they were, or give another --out"
    refuse_other_data(found.get("data", about), about, path, remedy)  # those of earlier versions do not say it
    if damage:
        say(f"{damage[0]}; the run goes on from the checkpoint before it, {path}")
    return found


def open_checkpoint(path: Path) -> Any:
    """What a checkpoint holds. Damaged, or OSError for what has nothing to do with its contents."""
    sealed = False
    try:
        sealed = disk.check_seal(path, "put a good copy there")
        with path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except Damaged:
        raise
    except Exception as error:  # torch.load has no error of its own: many kinds come out of a damaged file
        if sealed or isinstance(error, OSError | MemoryError) or "allocate" in str(error):
            reason = f"{type(error).__name__}: {error}"
            raise OSError(f"{path} cannot be read now ({reason}); it was left as it is") from error
        raise Damaged(f"{path} is damaged ({error})") from error


def read_metrics(settings: Settings, folder: Path, same_data: bool = False) -> dict[str, Any] | None:
    """The metrics of a finished run; None if there is none, or if it was evaluated otherwise.
    same_data: whether its images are known to be these, wherever they lay."""
    path, remedy = folder / "metrics.json", "remove it, and the same command evaluates again"
    if not path.exists():
        return None
    metrics = disk.read_json(path, remedy)
    kinds = {"settings": dict, "students": list, "teacher": dict, "protocol": str}
    if not all(isinstance(metrics.get(key), kind) for key, kind in kinds.items()):
        raise Damaged(f"{path} is not what train.py writes: {remedy}")
    refuse_other_settings(settings, metrics["settings"], path, {"data"} if same_data else set())
    now, former = plain(settings), plain(restored(metrics["settings"]))
    return metrics if all(former[name] == now[name] for name in EVALUATION) else None


def refuse_other_settings(settings: Settings, former: dict[str, Any], path: Path, also: Set[str] = frozenset()) -> None:
    """ValueError that names the settings in which the run at `path` differs, where they make it another run."""
    chosen = {"taylor_batch": settings.taylor_batch}  # long ago: a checkpoint brings its own channels
    now, former = plain(settings), plain(restored({**chosen, **former}))
    free = FREE | EVALUATION | settings.unused | also
    differ = [name for name in now if name not in free and now[name] != former[name]]
    if differ:
        changes = ", ".join(f"{flag(name)} was {former[name]}, is {now[name]}" for name in differ)
        remedy = "give the former ones, or another --out"
        remedy += ", and --student to go on from there" if differ == ["steps"] else ""
        raise ValueError(f"{path} is of a run with other settings ({changes}): {remedy}")


def refuse_other_data(former: dict[str, Any], about: dict[str, Any], path: Path, remedy: str) -> None:
    """ValueError where the data is not what it was when `path` was written; both as `Images.about`."""
    if former != about:
        counts = f"{former.get('images')} images then, {about['images']} now"
        what = counts if former.get("images") != about["images"] else f"{counts}, but not the same"
        raise ValueError(f"the data has changed since {path} was written ({what}): {remedy}")
