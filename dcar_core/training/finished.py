"""Recognise a finished training, so that the same command does not repeat it. PyTorch is not imported.

A checkpoint's config.json notes the request that made it: the options, and the state of the data and of local models.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dcar_core.data import Annotations, Dataset, ImagePolicy
from dcar_core.model.checkpoint import is_checkpoint, read_config
from dcar_core.model.config import TrainConfig
from dcar_core.util.errors import TrainingError
from dcar_core.util.files import hash_json

STATE_FILE = "state.pt"  # of an unfinished run
_REMEDY = "choose another --out, or replace it with --restart"


@dataclass(frozen=True)
class FinishedTraining:
    """The outcome of a training. verdict: its lines, "" for a method that learns nothing."""

    epoch: int
    seconds: float
    fingerprint: str
    verdict: str
    is_worth_it: bool


def describe_request(
    data: Path, model: str, pretrained: str | None, config: TrainConfig,
    *, images: Path | None, skip_broken: bool, taxonomy: Path | None, **options: str | None,
) -> dict[str, Any]:  # fmt: skip
    """Return everything that determines a training, by names that a message can use. Raise DataError for bad data.

    Files count by their size and time of change, captions and other texts by their content.

    Args:
        options: the other options of `adapt` that decide on the result.
    """
    policy: ImagePolicy = "present" if skip_broken else "require"
    splits, _ = Annotations(data, images).load_all(("train", "val"), policy)
    return {
        "model": _name_or_state(model),
        "pretrained": _name_or_state(pretrained),
        "data": hash_json([_describe_split(split) for split in splits.values()])[:16],
        "skip_broken": skip_broken,
        "taxonomy": _name_or_state(str(taxonomy)) if taxonomy else None,
        **options,
        **config.to_dict(),
    }


def find_finished(out: Path, request: Mapping[str, Any]) -> FinishedTraining | None:
    """Return the training in `out` if it is the requested one; None if there is none, or one is to be resumed.

    Raises:
        TrainingError: the checkpoint in `out` is of another training.
        CheckpointError: it cannot be read.
    """
    if not is_checkpoint(out) or (out / STATE_FILE).is_file():
        return None
    content = read_config(out)
    made_by, notes = content["model"].get("method"), content.get("training", {})
    found = notes.get("request")
    if not isinstance(found, dict):
        raise TrainingError(f"{out} holds a checkpoint of {made_by} from another command; {_REMEDY}")
    wanted = dict(request)
    if found.get("method") is None and wanted.get("method") == made_by:
        wanted["method"] = None  # it is the default of this model
    if different := [name for name in wanted if found.get(name) != wanted[name]]:
        raise TrainingError(f"{out} holds a checkpoint that was trained with another {', '.join(different)}; {_REMEDY}")
    noted = {each.name: notes[each.name] for each in fields(FinishedTraining)}
    return FinishedTraining(**noted | {"fingerprint": content["fingerprint"]})


def _describe_split(split: Dataset) -> list[Any]:
    places = {name: split.root.locate(name) for name in split.images}
    states = {path: _state(path) for path in {path for path, _ in places.values()}}
    samples = [[*vars(sample).values()] for sample in split.samples]
    return [samples, [[offset, *states[path]] for path, offset in places.values()]]


def _name_or_state(place: str | None) -> str | None:
    """Return a name as it is, and the state of the files of a local path."""
    path = Path(place or "")
    if not place or not path.exists():
        return place
    files = sorted(each for each in path.iterdir() if each.is_file()) if path.is_dir() else [path]
    return f"{path.name} {hash_json([[file.name, *_state(file)] for file in files])[:16]}"


def _state(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
