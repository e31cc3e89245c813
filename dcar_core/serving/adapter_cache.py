"""A domain on disk, with the name of the export that it goes with: all that a later start needs to encode.

    CACHE/sealed/FINGERPRINT_RUNTIME_THREADS.safetensors

Loading PyTorch, open_clip and the model takes seconds and hundreds of megabytes, and a service that runs an exported
graph needs them for nothing but re-ranking and explaining. So the first start writes down what it found, and later ones
check that all of it still holds:

- the checkpoint, by its fingerprint, which is computed again; the backbone's files by size and time; the libraries'
  versions, the processor, the number of threads;
- the export by its checksums, and what was written here by its own;
- at last the vectors themselves: on a probe they must be those that PyTorch in float32 gave when it was sealed.

Whatever does not hold is no error: the start is then a whole one, which tells what is wrong and seals anew.
"""

import hashlib
import json
import logging
import os
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from dcar_core.model.checkpoint import backbone_files, fingerprint, read_config, read_trainables
from dcar_core.model.config import ModelConfig
from dcar_core.model.preprocess import Preprocess
from dcar_core.runtimes.adapter import Bottleneck, Domain
from dcar_core.runtimes.equality_proof import Probe, prove, reference
from dcar_core.runtimes.export_cache import GRAPHS, MANIFEST, ExportKey, default_cache, exported
from dcar_core.runtimes.protocol import ExportRuntime, Prefix, Runtime
from dcar_core.runtimes.registry import AUTO, KINDS, open_export
from dcar_core.util import cpu_features
from dcar_core.util.errors import DcarError
from dcar_core.util.files import atomic_writer

if TYPE_CHECKING:
    from dcar_core.runtimes.registry import Target

log = logging.getLogger(__name__)

FORMAT = 1
_LIBRARIES = ("dcar", "torch", "open_clip_torch", "openvino", "onnxruntime", "tokenizers", "ftfy")
_GPUS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # what `auto` might prefer to the processor
_TOKENIZER = "tokenizer"
_ADAPTERS = ("text_adapter", "image_adapter")
_PARTS = ("down", "down_bias", "up", "up_bias")

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Wanted:
    """What is to be loaded, as `Encoder.load` was asked for it."""

    checkpoint: Path
    device: str
    runtime: str
    threads: int | None
    cache: Path

    @property
    def possible(self) -> bool:
        """Whether it can be an export at all."""
        on_cpu = self.device == "cpu" or (
            self.device == "auto" and sys.platform != "darwin" and not any(Path(gpu).exists() for gpu in _GPUS)
        )
        return on_cpu and (self.runtime == AUTO or KINDS[self.runtime].extra is not None)

    def file(self, mark: str) -> Path:
        return directory(self.cache) / f"{mark[:16]}_{self.runtime}_{self.threads or 'auto'}.safetensors"


def directory(cache: Path) -> Path:
    return cache / "sealed"


def seal(wanted: Wanted, domain: Domain, target: "Target", runtime: Runtime) -> None:
    """Write down a domain and its runtime, if it runs an export and gives PyTorch's vectors.

    A cache that cannot be written costs later starts their time, nothing else.
    """
    if not wanted.possible or not isinstance(runtime, ExportRuntime):
        return
    tokens = target.backbone.own_tokens(target.model.room)
    if tokens is None:
        return
    probe = Probe.synthetic(domain.preprocess.size)
    texts, images = reference(target.model, probe)
    if not prove(domain, runtime, probe, (texts, images)).holds:
        return
    manifest = json.loads((runtime.directory / MANIFEST).read_text(encoding="utf-8"))
    content = {
        "circumstances": _circumstances(wanted),
        "fingerprint": domain.fingerprint,
        "runtime": runtime.name,
        "threads": runtime.threads,
        "export": {name: manifest[name] for name in ("runtime", "backbone", "depth", "library", "fingerprint")},
        "dim": domain.dim,
        "patches": domain.patches,
        "weighs": domain.weighs,
        "room": target.model.room,
        "context": target.backbone.context_length,
        "preprocess": domain.preprocess.to_dict(),
    }
    arrays: Arrays = {
        "keys": domain.prefix.keys,
        "values": domain.prefix.values,
        "probe_texts": texts,
        "probe_images": images,
        _TOKENIZER: np.frombuffer(tokens.dump(), np.uint8),
    }
    for name, found in (("image_prompts", domain.image_prompts), ("factors", domain.factors)):
        if found is not None:
            arrays[name] = found
    for name in _ADAPTERS:
        if (adapter := getattr(domain, name)) is not None:
            arrays |= {f"{name}.{part}": getattr(adapter, part) for part in _PARTS}
    arrays = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    path = wanted.file(domain.fingerprint)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_writer(path, shared=True) as file:
            file.write(save(arrays, {"content": json.dumps(content), "sha256": _checksum(content, arrays)}))
    except OSError as error:
        log.warning("what later starts could use cannot be kept in %s: %s", path.parent, error.strerror or error)


def unseal(wanted: Wanted) -> tuple[Domain, Runtime] | None:
    """What `seal` wrote, if it still holds; else None."""
    if not wanted.possible:
        return None
    try:
        return _unseal(wanted)
    except (DcarError, OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        log.debug("nothing that was sealed for %s can be used: %s", wanted.checkpoint, error)
        return None


def is_kept(checkpoint: Path, mark: str, device: str) -> bool:
    """Whether `auto` has something to start from in the default cache, so that it need not measure.

    mark: the checkpoint's fingerprint.
    """
    wanted = Wanted(checkpoint, device, AUTO, None, default_cache())
    return wanted.possible and wanted.file(mark).is_file()


def forget(cache: Path, backbone: str) -> None:
    """Remove what is sealed of a backbone, by the hash of its weights: the ranking of its runtimes is another now."""
    for path in directory(cache).glob("*.safetensors"):
        try:
            with safe_open(str(path), "np") as file:
                other = json.loads(file.metadata()["content"])["export"]["backbone"] != backbone
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            other = False  # nobody can use it
        if not other:
            path.unlink(missing_ok=True)


def _unseal(wanted: Wanted) -> tuple[Domain, Runtime] | None:
    described = read_config(wanted.checkpoint)
    config = ModelConfig.from_dict(described["model"])
    mark = fingerprint(described["backbone"]["sha256"], config, read_trainables(wanted.checkpoint))
    path = wanted.file(mark)
    if not path.is_file():
        return None
    with safe_open(str(path), "np") as file:
        metadata = file.metadata()
        arrays: Arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    content = json.loads(metadata["content"])
    torch = sys.modules.get("torch")
    if (
        metadata["sha256"] != _checksum(content, arrays)
        or content["fingerprint"] != mark
        or content["circumstances"] != _circumstances(wanted)
        or (torch is not None and torch.get_num_threads() != content["threads"])
        or content["export"]["backbone"] != described["backbone"]["sha256"]
    ):
        return None
    key = ExportKey(**content["export"])
    with ThreadPoolExecutor(1) as pool:
        checked = pool.submit(exported, key, wanted.cache, None)  # beside compiling; nothing is used before it is done
        domain = _domain(content, arrays)
        runtime = open_export(content["runtime"], key.directory(wanted.cache), content["threads"])
        checked.result()
    probe = Probe.synthetic(domain.preprocess.size)
    proof = prove(domain, runtime, probe, (arrays["probe_texts"], arrays["probe_images"]))
    return (domain, runtime) if proof.holds else None


def _domain(content: Mapping[str, Any], arrays: Arrays) -> Domain:
    from dcar_core.model.tokenizer import Tokens

    adapters = {
        name: Bottleneck(*(arrays[f"{name}.{part}"] for part in _PARTS)) if f"{name}.down" in arrays else None
        for name in _ADAPTERS
    }
    shape = content["preprocess"]
    preprocess = Preprocess(**{**shape, "mean": tuple(shape["mean"]), "std": tuple(shape["std"])})
    return Domain(
        fingerprint=content["fingerprint"],
        dim=content["dim"],
        patches=content["patches"],
        weighs=content["weighs"],
        preprocess=preprocess,
        tokenize=Tokens.load(arrays[_TOKENIZER].tobytes(), content["context"] - content["room"]),
        prefix=Prefix(arrays["keys"], arrays["values"], None),
        image_prompts=arrays.get("image_prompts"),
        factors=arrays.get("factors"),
        **adapters,
    )


def _circumstances(wanted: Wanted) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "graphs": GRAPHS,
        "libraries": cpu_features.installed_versions(_LIBRARIES),
        "processor": cpu_features.processor_id(),
        "cores": cpu_features.available_cores(),
        "omp": os.environ.get("OMP_NUM_THREADS"),
        "backbone": [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in backbone_files(wanted.checkpoint)],
    }


def _checksum(content: Mapping[str, Any], arrays: Arrays) -> str:
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()
