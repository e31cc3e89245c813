"""A adapter on disk, with the name of the export that it goes with: all that a later start needs to encode.

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
from dcar_core.runtimes.adapter import Adapter, Bottleneck
from dcar_core.runtimes.equality_proof import Probe, prove, reference_vectors
from dcar_core.runtimes.export_cache import GRAPHS, MANIFEST, ExportKey, default_cache_directory, ensure_export
from dcar_core.runtimes.protocol import ExportRuntime, Prefix, Runtime
from dcar_core.runtimes.registry import AUTO, RUNTIME_KINDS, open_export
from dcar_core.util import cpu_features
from dcar_core.util.errors import DcarError
from dcar_core.util.files import atomic_writer

if TYPE_CHECKING:
    from dcar_core.runtimes.registry import LoadedModel

log = logging.getLogger(__name__)

FORMAT = 1
_LIBRARIES = ("dcar", "torch", "open_clip_torch", "openvino", "onnxruntime", "tokenizers", "ftfy")
_GPUS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # what `auto` might prefer to the processor
_TOKENIZER = "tokenizer"
_BOTTLENECKS = ("text_bottleneck", "image_bottleneck")
_PARTS = ("down", "down_bias", "up", "up_bias")

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class LoadRequest:
    """What is to be loaded, as `Encoder.load` was asked for it."""

    checkpoint: Path
    device: str
    runtime: str
    threads: int | None
    cache: Path

    @property
    def may_use_export(self) -> bool:
        """Whether it can be an export at all."""
        on_cpu = self.device == "cpu" or (
            self.device == "auto" and sys.platform != "darwin" and not any(Path(gpu).exists() for gpu in _GPUS)
        )
        return on_cpu and (self.runtime == AUTO or RUNTIME_KINDS[self.runtime].extra is not None)

    def file(self, mark: str) -> Path:
        return directory_in(self.cache) / f"{mark[:16]}_{self.runtime}_{self.threads or 'auto'}.safetensors"


def directory_in(cache: Path) -> Path:
    return cache / "adapters"


def store(request: LoadRequest, adapter: Adapter, loaded: "LoadedModel", runtime: Runtime) -> None:
    """Write down a adapter and its runtime, if it runs an export and gives PyTorch's vectors.

    A cache that cannot be written costs later starts their time, nothing else.
    """
    if not request.may_use_export or not isinstance(runtime, ExportRuntime):
        return
    tokens = loaded.backbone.standalone_tokenizer(loaded.model.prompt_tokens)
    if tokens is None:
        return
    probe = Probe.synthetic(adapter.preprocess.size)
    texts, images = reference_vectors(loaded.model, probe)
    if not prove(adapter, runtime, probe, (texts, images)).holds:
        return
    manifest = json.loads((runtime.directory / MANIFEST).read_text(encoding="utf-8"))
    content = {
        "circumstances": _circumstances(request),
        "fingerprint": adapter.fingerprint,
        "runtime": runtime.name,
        "threads": runtime.threads,
        "export": {name: manifest[name] for name in ("runtime", "backbone", "depth", "library", "fingerprint")},
        "dim": adapter.dim,
        "patch_grid": adapter.patch_grid,
        "uses_token_weights": adapter.uses_token_weights,
        "room": loaded.model.prompt_tokens,
        "context": loaded.backbone.context_length,
        "preprocess": adapter.preprocess.to_dict(),
    }
    arrays: Arrays = {
        "keys": adapter.prefix.keys,
        "values": adapter.prefix.values,
        "probe_texts": texts,
        "probe_images": images,
        _TOKENIZER: np.frombuffer(tokens.to_bytes(), np.uint8),
    }
    for name, found in (("image_prompts", adapter.image_prompts), ("factors", adapter.factors)):
        if found is not None:
            arrays[name] = found
    for name in _BOTTLENECKS:
        if (bottleneck := getattr(adapter, name)) is not None:
            arrays |= {f"{name}.{part}": getattr(bottleneck, part) for part in _PARTS}
    arrays = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    path = request.file(adapter.fingerprint)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_writer(path, shared=True) as file:
            file.write(save(arrays, {"content": json.dumps(content), "sha256": _checksum(content, arrays)}))
    except OSError as error:
        log.warning("what later starts could use cannot be kept in %s: %s", path.parent, error.strerror or error)


def restore(request: LoadRequest) -> tuple[Adapter, Runtime] | None:
    """What `seal` wrote, if it still holds; else None."""
    if not request.may_use_export:
        return None
    try:
        return _restore(request)
    except (DcarError, OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        log.debug("nothing that was sealed for %s can be used: %s", request.checkpoint, error)
        return None


def has_entry(checkpoint: Path, mark: str, device: str) -> bool:
    """Whether `auto` has something to start from in the default cache, so that it need not measure.

    mark: the checkpoint's fingerprint.
    """
    request = LoadRequest(checkpoint, device, AUTO, None, default_cache_directory())
    return request.may_use_export and request.file(mark).is_file()


def discard(cache: Path, backbone: str) -> None:
    """Remove what is sealed of a backbone, by the hash of its weights: the ranking of its runtimes is another now."""
    for path in directory_in(cache).glob("*.safetensors"):
        try:
            with safe_open(str(path), "np") as file:
                other = json.loads(file.metadata()["content"])["export"]["backbone"] != backbone
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            other = False  # nobody can use it
        if not other:
            path.unlink(missing_ok=True)


def _restore(request: LoadRequest) -> tuple[Adapter, Runtime] | None:
    described = read_config(request.checkpoint)
    config = ModelConfig.from_dict(described["model"])
    mark = fingerprint(described["backbone"]["sha256"], config, read_trainables(request.checkpoint))
    path = request.file(mark)
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
        or content["circumstances"] != _circumstances(request)
        or (torch is not None and torch.get_num_threads() != content["threads"])
        or content["export"]["backbone"] != described["backbone"]["sha256"]
    ):
        return None
    key = ExportKey(**content["export"])
    with ThreadPoolExecutor(1) as pool:
        checked = pool.submit(
            ensure_export, key, request.cache, None
        )  # beside compiling; nothing is used before it is done
        adapter = _adapter_from(content, arrays)
        runtime = open_export(content["runtime"], key.directory(request.cache), content["threads"])
        checked.result()
    probe = Probe.synthetic(adapter.preprocess.size)
    proof = prove(adapter, runtime, probe, (arrays["probe_texts"], arrays["probe_images"]))
    return (adapter, runtime) if proof.holds else None


def _adapter_from(content: Mapping[str, Any], arrays: Arrays) -> Adapter:
    from dcar_core.model.tokenizer import TextTokenizer

    bottlenecks = {
        name: Bottleneck(*(arrays[f"{name}.{part}"] for part in _PARTS)) if f"{name}.down" in arrays else None
        for name in _BOTTLENECKS
    }
    shape = content["preprocess"]
    preprocess = Preprocess(**{**shape, "mean": tuple(shape["mean"]), "std": tuple(shape["std"])})
    return Adapter(
        fingerprint=content["fingerprint"],
        dim=content["dim"],
        patch_grid=content["patch_grid"],
        uses_token_weights=content["uses_token_weights"],
        preprocess=preprocess,
        tokenize=TextTokenizer.from_bytes(arrays[_TOKENIZER].tobytes(), content["context"] - content["room"]),
        prefix=Prefix(arrays["keys"], arrays["values"], None),
        image_prompts=arrays.get("image_prompts"),
        factors=arrays.get("factors"),
        **bottlenecks,
    )


def _circumstances(request: LoadRequest) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "graphs": GRAPHS,
        "libraries": cpu_features.installed_versions(_LIBRARIES),
        "processor": cpu_features.processor_id(),
        "cores": cpu_features.available_cores(),
        "omp": os.environ.get("OMP_NUM_THREADS"),
        "backbone": [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in backbone_files(request.checkpoint)],
    }


def _checksum(content: Mapping[str, Any], arrays: Arrays) -> str:
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()
