"""Cached states of encoders, each beside its export, for later starts without PyTorch.

    CACHE/exports/NAME/encoder-FINGERPRINT    sha256, then safetensors
    CHECKPOINT/portable/encoder               the same; see `add_portable_export`

- Loading PyTorch and the model takes seconds and hundreds of megabytes, which an export needs for re-ranking alone.
- An entry holds for one checkpoint, whose fingerprint is computed again; the entry and the export have checksums; and
  the vectors of a probe must match those that PyTorch gave in float32 when the entry was written.
- If a check fails, the full model is loaded and the entry is written again.
"""

import hashlib
import json
import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save
from tokenizers import Tokenizer

from dcar_core.encoder import runtimes
from dcar_core.encoder.openvino_runtime import GRAPHS, check_export
from dcar_core.encoder.state import EncoderState, FeatureAdapterArrays, Runtime, TextPrompts
from dcar_core.model.checkpoint import PORTABLE, compute_fingerprint, read_config, read_trainables
from dcar_core.model.config import ModelConfig
from dcar_core.model.preprocess import Preprocess
from dcar_core.model.text.tokenizer import TextLayout, TextTokenizer
from dcar_core.util import machine
from dcar_core.util.arrays import Floats
from dcar_core.util.errors import DcarError, MissingExtraError, RuntimeUnavailableError
from dcar_core.util.files import default_cache_directory, link_or_copy, write_bytes

if TYPE_CHECKING:
    from dcar_core.model.dcar import DCAR

logger = logging.getLogger(__name__)

FORMAT = 10
ENTRY = "encoder"
_GPUS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # what `auto` might prefer to the processor
_DATACLASSES: dict[str, Any] = {
    kind.__name__: kind
    for kind in (EncoderState, FeatureAdapterArrays, Preprocess, TextLayout, TextPrompts, TextTokenizer)
}

_FAULTS = (DcarError, OSError, SafetensorError, ValueError, KeyError, TypeError)

Arrays = dict[str, NDArray[Any]]


def may_use_export(device: str, runtime: str) -> bool:
    """Return whether `Encoder.load` with these arguments may run an export."""
    may_have_gpu = sys.platform == "darwin" or any(Path(gpu).exists() for gpu in _GPUS)
    on_cpu = device == "cpu" or (device == "auto" and not (may_have_gpu and machine.is_installed("torch")))
    return on_cpu and runtime in (runtimes.AUTO, *runtimes.EXPORTED)


def entry_name(fingerprint: str) -> str:
    return f"{ENTRY}-{fingerprint[:16]}"


def store(export: Path, state: EncoderState, model: "DCAR") -> None:
    """Write an entry for an export whose vectors have been checked; a full disk only makes later starts slower."""
    try:
        _write(export / entry_name(state.fingerprint), state, runtimes.reference_vectors(model))
    except OSError as error:
        logger.warning("the encoder cannot be cached in %s: %s", export, error.strerror or error)


def copy_portable(source: Path, target: Path, state: EncoderState, probe_texts: Floats) -> None:
    """Copy the portable export of a checkpoint to one with another text adapter, that of `state`.

    probe_texts: its vectors of `PROBE_TEXTS`, by which every start checks the export.
    """
    arrays, _ = _read(source / PORTABLE / ENTRY)
    copy_export(source / PORTABLE, target / PORTABLE)
    _write(target / PORTABLE / ENTRY, state, (probe_texts, arrays["probe_images"]))


def copy_export(source: Path, target: Path) -> None:
    """Copy an export without the entries beside it."""
    target.mkdir()
    for file in source.iterdir():
        if file.suffix in (".json", ".xml", ".bin"):
            link_or_copy(file, target / file.name)


def has_entry(checkpoint: Path, fingerprint: str, device: str) -> bool:
    """True if `auto` can start without PyTorch. fingerprint: the checkpoint's fingerprint."""
    is_cached = any(default_cache_directory().glob(f"exports/*/{entry_name(fingerprint)}"))
    return may_use_export(device, runtimes.AUTO) and (is_cached or has_portable(checkpoint))


def restore(checkpoint: Path, runtime: str, threads: int | None, cache: Path) -> tuple[EncoderState, Runtime] | None:
    """Load a portable export, or else the entry that `store` wrote; None if there is none or a check fails."""
    portable, fingerprint = checkpoint / PORTABLE / ENTRY, read_config(checkpoint).get("fingerprint", "")
    for entry in [*[portable] * portable.parent.is_dir(), *sorted(cache.glob(f"exports/*/{entry_name(fingerprint)}"))]:
        try:
            return _open(entry, checkpoint, runtime, threads)
        except _FAULTS as error:
            is_expected = isinstance(error, MissingExtraError) and machine.is_installed("torch")
            level = logging.DEBUG if is_expected or entry != portable else logging.WARNING
            logger.log(level, "the export in %s cannot be used: %s", entry.parent, error)
    return None


def has_portable(checkpoint: Path) -> bool:
    """Return whether a checkpoint has a portable export that this release can use."""
    try:
        _read(checkpoint / PORTABLE / ENTRY)
    except (OSError, SafetensorError, ValueError, KeyError):
        return False
    return True


def _read(path: Path) -> tuple[Arrays, dict[str, Any]]:
    stored = path.read_bytes()
    if hashlib.sha256(stored[32:]).digest() != stored[:32]:
        raise ValueError("it is corrupted")
    arrays: Arrays = load(stored[32:])
    content = json.loads(arrays["content"].tobytes())
    made = content["circumstances"]
    if (made["format"], made["graphs"]) != (FORMAT, GRAPHS):
        raise ValueError("another release made it; build the index again")
    return arrays, content


def _write(path: Path, state: EncoderState, probe: runtimes.Vectors) -> None:
    arrays: Arrays = {"probe_texts": probe[0], "probe_images": probe[1]}
    content = {"circumstances": {"format": FORMAT, "graphs": GRAPHS}, "state": _pack(state, arrays)}
    arrays["content"] = np.frombuffer(json.dumps(content).encode(), np.uint8)
    body = save({name: np.ascontiguousarray(value) for name, value in arrays.items()})
    write_bytes(path, hashlib.sha256(body).digest() + body, shared=True)


def _open(entry: Path, checkpoint: Path, runtime: str, threads: int | None) -> tuple[EncoderState, Runtime]:
    """Open the export beside an entry by the first runtime that gives the probe's vectors."""
    arrays, content = _read(entry)
    state: EncoderState = _unpack(content["state"], arrays)
    described = read_config(checkpoint)
    config, trainables = ModelConfig.from_dict(described["model"]), read_trainables(checkpoint)
    if state.fingerprint != compute_fingerprint(described["backbone"]["sha256"], config, trainables):
        raise ValueError("it is of another checkpoint")
    with ThreadPoolExecutor(1) as pool:
        checked = pool.submit(check_export, entry.parent)  # while it is compiled

        def opened(name: str) -> Runtime:
            found = runtimes.open_export(name, entry.parent, threads)
            checked.result()
            runtimes.check_vectors(state, found, (arrays["probe_texts"], arrays["probe_images"]))
            return found

        *others, last = runtimes.auto_exports() if runtime == runtimes.AUTO else [runtime]
        for name in others:
            with suppress(RuntimeUnavailableError):
                return state, opened(name)
        return state, opened(last)


def _pack(value: Any, arrays: Arrays) -> Any:
    """Return a value as JSON; its arrays and vocabulary are put into `arrays` and stand in it by their names."""
    name = str(len(arrays))
    if isinstance(value, np.ndarray):
        arrays[name] = value
        return {"array": name}
    if isinstance(value, Tokenizer):
        arrays[name] = np.frombuffer(value.to_str().encode(), np.uint8)
        return {"tokenizer": name}
    if isinstance(value, tuple | frozenset):
        return {type(value).__name__: [_pack(each, arrays) for each in value]}
    if type(value) in _DATACLASSES.values():
        return {type(value).__name__: {each.name: _pack(getattr(value, each.name), arrays) for each in fields(value)}}
    return value


def _unpack(value: Any, arrays: Arrays) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "array":
        return arrays[content]
    if kind == "tokenizer":
        return Tokenizer.from_buffer(arrays[content].tobytes())
    if kind in ("tuple", "frozenset"):
        return {"tuple": tuple, "frozenset": frozenset}[kind](_unpack(each, arrays) for each in content)
    return _DATACLASSES[kind](**{name: _unpack(each, arrays) for name, each in content.items()})
