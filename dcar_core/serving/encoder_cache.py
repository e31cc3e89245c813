"""Cached states of encoders, each with the name of its export, for later starts without PyTorch.

    CACHE/encoders/FINGERPRINT_RUNTIME_THREADS    sha256, then safetensors

- Loading PyTorch, open_clip and the model takes seconds and hundreds of megabytes, which a service on an exported graph
  needs for re-ranking alone.
- An entry holds for one checkpoint (its fingerprint is computed again), the same backbone files, library versions,
  processor and threads; the entry and the export have checksums.
- Finally, the vectors of a probe must match those that PyTorch gave in float32 when the entry was written.
- If a check fails, the full model is loaded and the entry is written again.
"""

import hashlib
import json
import logging
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save
from tokenizers import Tokenizer

from dcar_core.model.checkpoint import backbone_files, compute_fingerprint, read_config, read_trainables
from dcar_core.model.config import ModelConfig
from dcar_core.model.preprocess import Preprocess
from dcar_core.model.text.tokenizer import TextLayout, TextTokenizer
from dcar_core.runtimes.encoder_state import EncoderState, FeatureAdapterArrays, Runtime, TextPrompts
from dcar_core.runtimes.openvino_runtime import GRAPHS, OpenVinoRuntime, check_export
from dcar_core.runtimes.registry import AUTO, RUNTIME_KINDS, LoadedModel, open_export
from dcar_core.runtimes.selection import Probe, prove, reference_vectors
from dcar_core.util import machine
from dcar_core.util.errors import DcarError
from dcar_core.util.files import atomic_writer, default_cache_directory

logger = logging.getLogger(__name__)

FORMAT = 8
_LIBRARIES = (
    "dcar", "torch", "open_clip_torch", "timm", "transformers", "openvino", "tokenizers", "ftfy",
)  # fmt: skip
_GPUS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # what `auto` might prefer to the processor
_DATACLASSES: dict[str, Any] = {
    kind.__name__: kind
    for kind in (EncoderState, FeatureAdapterArrays, Preprocess, TextLayout, TextPrompts, TextTokenizer)
}

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class LoadRequest:
    """The arguments of `Encoder.load` that an entry depends on."""

    checkpoint: Path
    device: str
    runtime: str
    threads: int | None
    cache: Path

    @property
    def may_use_export(self) -> bool:
        on_cpu = self.device == "cpu" or (
            self.device == "auto" and sys.platform != "darwin" and not any(Path(gpu).exists() for gpu in _GPUS)
        )
        return on_cpu and (self.runtime == AUTO or RUNTIME_KINDS[self.runtime].extra is not None)

    def file(self, fingerprint: str) -> Path:
        return directory_in(self.cache) / f"{fingerprint[:16]}_{self.runtime}_{self.threads or 'auto'}"


def directory_in(cache: Path) -> Path:
    return cache / "encoders"


def store(request: LoadRequest, state: EncoderState, loaded: LoadedModel, runtime: Runtime) -> None:
    """Write an entry, if the runtime, whose vectors have been proven, runs an export.

    A cache that cannot be written only makes later starts slower.
    """
    if not request.may_use_export or not isinstance(runtime, OpenVinoRuntime):
        return
    texts, images = reference_vectors(loaded.model, Probe.synthetic(state.preprocess.size))
    arrays = {"probe_texts": texts, "probe_images": images}
    content = {
        "circumstances": _circumstances(request),
        "runtime": runtime.name,
        "threads": runtime.threads,
        "export": runtime.directory.name,
        "state": _pack(state, arrays),
    }
    arrays["content"] = np.frombuffer(json.dumps(content).encode(), np.uint8)
    body = save({name: np.ascontiguousarray(value) for name, value in arrays.items()})
    path = request.file(state.fingerprint)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_writer(path, shared=True) as file:
            file.write(hashlib.sha256(body).digest() + body)
    except OSError as error:
        logger.warning("the encoder cannot be cached in %s: %s", path.parent, error.strerror or error)


def has_entry(checkpoint: Path, fingerprint: str, device: str) -> bool:
    """True if `auto` can start from the default cache. fingerprint: the checkpoint's fingerprint."""
    request = LoadRequest(checkpoint, device, AUTO, None, default_cache_directory())
    return request.may_use_export and request.file(fingerprint).is_file()


def restore(request: LoadRequest) -> tuple[EncoderState, Runtime] | None:
    """Load the entry that `store` wrote; None if there is none or a check fails."""
    try:
        return _restore(request) if request.may_use_export else None
    except (DcarError, OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        logger.debug("no cached state of %s can be used: %s", request.checkpoint, error)
        return None


def _restore(request: LoadRequest) -> tuple[EncoderState, Runtime]:
    described = read_config(request.checkpoint)
    config = ModelConfig.from_dict(described["model"])
    fingerprint = compute_fingerprint(described["backbone"]["sha256"], config, read_trainables(request.checkpoint))
    stored = request.file(fingerprint).read_bytes()
    checksum, body = stored[:32], stored[32:]
    arrays: Arrays = load(body)
    content = json.loads(arrays["content"].tobytes())
    torch = sys.modules.get("torch")
    threads = content["threads"] if torch is None else torch.get_num_threads()
    found = hashlib.sha256(body).digest(), content["circumstances"], content["threads"]
    if found != (checksum, _circumstances(request), threads):
        raise ValueError("it is corrupted, or was made under other circumstances")
    export = request.cache / "exports" / content["export"]
    with ThreadPoolExecutor(1) as pool:
        checked = pool.submit(check_export, export)  # while it is compiled
        state: EncoderState = _unpack(content["state"], arrays)
        runtime = open_export(content["runtime"], export, content["threads"])
        checked.result()
    probe = Probe.synthetic(state.preprocess.size)
    proof = prove(state, runtime, probe, (arrays["probe_texts"], arrays["probe_images"]))
    if not proof.holds or state.fingerprint != fingerprint:
        raise ValueError(f"its vectors are others: {proof}")
    return state, runtime


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


def _circumstances(request: LoadRequest) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "graphs": GRAPHS,
        "libraries": machine.installed_versions(_LIBRARIES),
        "processor": machine.processor_id(),
        "cores": machine.available_cores(),
        "omp": os.environ.get("OMP_NUM_THREADS"),
        "files": [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in backbone_files(request.checkpoint)],
    }
