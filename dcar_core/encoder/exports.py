"""Exports for OpenVINO, and beside them the states of encoders, for later starts
without PyTorch.

    CACHE/exports/NAME/{manifest.json,*.xml,*.bin}
        both graphs in float32, and the checksum of every file
    CACHE/exports/NAME/encoder-FINGERPRINT            sha256, then safetensors
    CHECKPOINT/portable/
        the same, the entry as `encoder`; see `add_portable_export`

- NAME says what an export depends on, versions of libraries included. Nothing is a
  pickle, which could run code.
- An entry holds for one checkpoint, whose fingerprint is computed again, and the
  vectors of a probe must match those that PyTorch gave in float32 when the entry was
  written. Else the model is loaded and the entry written again.
"""

import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save
from tokenizers import Tokenizer

from dcar_core.encoder import runtimes
from dcar_core.encoder.state import (
    EncoderState,
    FeatureAdapterArrays,
    Runtime,
    openvino_library,
)
from dcar_core.model.checkpoint import (
    PORTABLE,
    compute_fingerprint,
    read_config,
    read_trainables,
)
from dcar_core.model.config import MODEL_CONFIG, ModelConfig
from dcar_core.model.preprocess import Preprocess
from dcar_core.model.tokenizer import TextLayout, TextTokenizer
from dcar_core.util import machine
from dcar_core.util.arrays import Floats
from dcar_core.util.errors import DcarError, RuntimeUnavailableError
from dcar_core.util.files import (
    default_cache_directory,
    link_or_copy,
    sha256_of,
    write_bytes,
)

if TYPE_CHECKING:
    from dcar_core.encoder.graphs import ImageGraph, TextGraph
    from dcar_core.model.dcar import DCAR

logger = logging.getLogger(__name__)

FORMAT = 11  # of entries
GRAPHS = 4  # version of the graphs: exports of another one are not used
ENTRY = "encoder"
MANIFEST = "manifest.json"
# what `auto` might prefer to the processor
_GPUS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
_DATACLASSES: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        EncoderState,
        FeatureAdapterArrays,
        Preprocess,
        TextLayout,
        TextTokenizer,
    )
}
_FAULTS = (DcarError, OSError, SafetensorError, ValueError, KeyError, TypeError)

Arrays = dict[str, NDArray[Any]]


def may_use_export(device: str, runtime: str) -> bool:
    """Return whether `Encoder.load` with these arguments may run an export."""
    may_have_gpu = sys.platform == "darwin" or any(Path(gpu).exists() for gpu in _GPUS)
    on_cpu = device == "cpu" or (
        device == "auto" and not (may_have_gpu and machine.is_installed("torch"))
    )
    return on_cpu and (
        runtime in runtimes.EXPORTED
        or (runtime == runtimes.AUTO and machine.is_installed("openvino"))
    )


def ensure_export(model: "DCAR", backbone_hash: str, cache: Path) -> Path:
    """Return the directory of a model's checked export; make it where there is none.

    Its name has the depths of image and text prompts, such as d4t0, and "a" for
    adapters of blocks. Raise RuntimeUnavailableError if it is corrupted, or cannot be
    made or written.
    """
    from dcar_core.encoder.graphs import graphs_of

    text, image = graphs_of(model)
    inputs = f"d{image.depth}t{text.depth}" + ("a" if image.has_adapters else "")
    openvino_version = openvino_library().__version__.split("-")[0]
    torch_version = version("torch").split("+")[0]
    versions = f"{openvino_version}-torch-{torch_version}"
    final = (
        cache
        / "exports"
        / f"{backbone_hash[:16]}_{inputs}_openvino_{versions}_g{GRAPHS}"
    )
    try:
        if not final.is_dir():
            final.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(final.with_name(final.name + ".lock")):
                if not final.is_dir():
                    logger.info("converting the model for OpenVINO, once")
                    _export(final, {runtimes.TEXT: text, runtimes.IMAGE: image})
        check_export(final)
    except OSError as error:
        raise RuntimeUnavailableError(
            f"the cache of exports in {cache} cannot be used:"
            f" {error.strerror or error}; name another directory"
        ) from error
    return final


def _export(final: Path, graphs: "Mapping[str, TextGraph | ImageGraph]") -> None:
    """Convert and save the graphs, weights in float32. A `.part` is of a process that
    was killed.
    """
    from dcar_core.encoder.graphs import tracing

    openvino = openvino_library()
    aside = final.with_name(final.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        for name, graph in graphs.items():
            inputs, shapes = graph.example()
            shapes = [openvino.PartialShape(shape) for shape in shapes]
            with tracing():
                converted = openvino.convert_model(
                    graph,
                    example_input=inputs,
                    input=shapes,
                )
            openvino.save_model(converted, aside / name, compress_to_fp16=False)
        files = {path.name: sha256_of(path) for path in sorted(aside.iterdir())}
        (aside / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n")
        aside.rename(final)
    except OSError:
        raise
    except Exception as error:  # exporters raise errors of any kind
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RuntimeUnavailableError(
            f"this model cannot be exported for openvino: {reason}"
        ) from error


def check_export(final: Path) -> None:
    """Raise RuntimeUnavailableError if an export lacks a file, or a file has
    changed.
    """
    try:
        files = json.loads((final / MANIFEST).read_text(encoding="utf-8"))["files"]
        corrupted = [
            name
            for name, checksum in files.items()
            if sha256_of(final / name) != checksum
        ]
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        FileNotFoundError,
    ) as error:
        raise RuntimeUnavailableError(
            f"{final} is incomplete ({error!r}); delete it for a new one"
        ) from None
    if corrupted:
        raise RuntimeUnavailableError(
            f"{final} is corrupted: {', '.join(corrupted)} changed; delete it for a"
            " new one"
        )


def entry_name(fingerprint: str) -> str:
    return f"{ENTRY}-{fingerprint[:16]}"


def store(export: Path, state: EncoderState, model: "DCAR") -> None:
    """Write an entry for an export whose vectors have been checked; a full disk only
    makes later starts slower.
    """
    try:
        _write(
            export / entry_name(state.fingerprint),
            state,
            runtimes.reference_vectors(model),
        )
    except OSError as error:
        logger.warning(
            "the encoder cannot be cached in %s: %s",
            export,
            error.strerror or error,
        )


def copy_portable(
    source: Path,
    target: Path,
    state: EncoderState,
    probe_texts: Floats,
) -> None:
    """Copy the portable files of a checkpoint to one with another text adapter, that of
    `state`.

    probe_texts: its vectors of `PROBE_TEXTS`, by which every start checks the export.
    """
    copy_export(source / PORTABLE, target / PORTABLE)
    if (source / PORTABLE / MODEL_CONFIG).is_file():
        return
    arrays, _ = _read(source / PORTABLE / ENTRY)
    _write(target / PORTABLE / ENTRY, state, (probe_texts, arrays["probe_images"]))


def copy_export(source: Path, target: Path) -> None:
    """Copy an export without the entries beside it."""
    target.mkdir()
    for file in source.iterdir():
        if not file.name.startswith(ENTRY):
            link_or_copy(file, target / file.name)


def has_entry(checkpoint: Path) -> bool:
    """Return whether a checkpoint has an entry, in the default cache or its own."""
    name = entry_name(read_config(checkpoint)["fingerprint"])
    return any(default_cache_directory().glob(f"exports/*/{name}")) or has_portable(
        checkpoint
    )


def restore(
    checkpoint: Path,
    runtime: str,
    threads: int | None,
    cache: Path,
) -> tuple[EncoderState, Runtime] | None:
    """Load a portable export, or else the entry that `store` wrote; None if there is
    none or a check fails.
    """
    portable = checkpoint / PORTABLE / ENTRY
    fingerprint = read_config(checkpoint).get("fingerprint", "")
    for entry in [
        *[portable] * portable.parent.is_dir(),
        *sorted(cache.glob(f"exports/*/{entry_name(fingerprint)}")),
    ]:
        try:
            return _open(entry, checkpoint, runtime, threads)
        except _FAULTS as error:
            logger.warning("the export in %s cannot be used: %s", entry.parent, error)
    return None


def has_portable(checkpoint: Path) -> bool:
    """Return whether a checkpoint has portable files that this release can use."""
    if (checkpoint / PORTABLE / MODEL_CONFIG).is_file():
        return True
    with suppress(*_FAULTS):
        _read(checkpoint / PORTABLE / ENTRY)
        return True
    return False


def _read(path: Path) -> tuple[Arrays, dict[str, Any]]:
    stored = path.read_bytes()
    if hashlib.sha256(stored[32:]).digest() != stored[:32]:
        raise ValueError("it is corrupted")
    arrays: Arrays = load(stored[32:])
    content = json.loads(arrays["content"].tobytes())
    if (content.get("format"), content.get("graphs")) != (FORMAT, GRAPHS):
        raise ValueError("another release made it; build the index again")
    return arrays, content


def _write(path: Path, state: EncoderState, probe: runtimes.Vectors) -> None:
    arrays: Arrays = {"probe_texts": probe[0], "probe_images": probe[1]}
    content = {"format": FORMAT, "graphs": GRAPHS, "state": _pack(state, arrays)}
    arrays["content"] = np.frombuffer(json.dumps(content).encode(), np.uint8)
    body = save({name: np.ascontiguousarray(value) for name, value in arrays.items()})
    write_bytes(path, hashlib.sha256(body).digest() + body, shared=True)


def _open(
    entry: Path,
    checkpoint: Path,
    runtime: str,
    threads: int | None,
) -> tuple[EncoderState, Runtime]:
    """Open the export beside an entry by the first runtime that gives the probe's
    vectors.
    """
    arrays, content = _read(entry)
    state: EncoderState = _unpack(content["state"], arrays)
    described = read_config(checkpoint)
    config = ModelConfig.from_dict(described["model"])
    trainables = read_trainables(checkpoint)
    if state.fingerprint != compute_fingerprint(
        described["backbone"]["sha256"],
        config,
        trainables,
    ):
        raise ValueError("it is of another checkpoint")
    names = runtimes.auto_exports() if runtime == runtimes.AUTO else [runtime]
    with ThreadPoolExecutor(1) as pool:
        checked = pool.submit(check_export, entry.parent)  # while it is compiled
        for name in names:
            try:
                opened = runtimes.open_export(name, entry.parent, threads)
                checked.result()
                runtimes.check_vectors(
                    state,
                    opened,
                    (arrays["probe_texts"], arrays["probe_images"]),
                )
            except RuntimeUnavailableError as error:
                fault = error
            else:
                return state, opened
    raise fault


def _pack(value: Any, arrays: Arrays) -> Any:
    """Return a value as JSON; its arrays and vocabulary are put into `arrays` and stand
    in it by their names.
    """
    name = str(len(arrays))
    if isinstance(value, np.ndarray):
        arrays[name] = value
        return {"array": name}
    if isinstance(value, Tokenizer):
        arrays[name] = np.frombuffer(value.to_str().encode(), np.uint8)
        return {"tokenizer": name}
    if isinstance(value, tuple | frozenset):
        return {type(value).__name__: [_pack(item, arrays) for item in value]}
    if type(value) in _DATACLASSES.values():
        return {
            type(value).__name__: {
                field.name: _pack(getattr(value, field.name), arrays)
                for field in fields(value)
            }
        }
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
        return {"tuple": tuple, "frozenset": frozenset}[kind](
            _unpack(item, arrays) for item in content
        )
    return _DATACLASSES[kind](
        **{name: _unpack(item, arrays) for name, item in content.items()}
    )
