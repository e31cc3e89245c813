"""Cached adapters, each with the name of its export, for later starts without PyTorch.

    CACHE/adapters/FINGERPRINT_RUNTIME_THREADS    sha256, then safetensors

- Loading PyTorch, open_clip and the model takes seconds and hundreds of megabytes, which a service on an exported graph
  needs for re-ranking and explaining alone.
- An entry holds for one checkpoint (its fingerprint is computed again), the same backbone files, library versions,
  processor and threads; the entry and the export have checksums.
- At last the vectors of a probe must be those that PyTorch gave in float32 when the entry was written.
- If a check fails, the full model is loaded and the entry is written anew.
"""

import hashlib
import json
import logging
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from dcar_core.model.checkpoint import backbone_files, fingerprint, read_config, read_trainables
from dcar_core.model.config import ModelConfig
from dcar_core.model.preprocess import Preprocess
from dcar_core.model.text.layout import TextLayout
from dcar_core.model.text.tokenizer import TextTokenizer
from dcar_core.runtimes.adapter import Adapter, Bottleneck
from dcar_core.runtimes.equality_proof import Probe, prove, reference_vectors
from dcar_core.runtimes.export_cache import GRAPHS, ExportKey, default_cache_directory, ensure_export
from dcar_core.runtimes.protocol import ExportRuntime, Runtime, TextPrompts
from dcar_core.runtimes.registry import AUTO, RUNTIME_KINDS, open_export
from dcar_core.util import cpu_features
from dcar_core.util.errors import DcarError
from dcar_core.util.files import atomic_writer

if TYPE_CHECKING:
    from dcar_core.runtimes.registry import LoadedModel

logger = logging.getLogger(__name__)

FORMAT = 2
_LIBRARIES = (
    "dcar", "torch", "open_clip_torch", "timm", "transformers", "openvino", "onnxruntime", "tokenizers", "ftfy",
)  # fmt: skip
_GPUS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # what `auto` might prefer to the processor
_BOTTLENECKS = ("text_bottleneck", "image_bottleneck")

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

    def file(self, mark: str) -> Path:
        return directory_in(self.cache) / f"{mark[:16]}_{self.runtime}_{self.threads or 'auto'}"


def directory_in(cache: Path) -> Path:
    return cache / "adapters"


def store(request: LoadRequest, adapter: Adapter, loaded: "LoadedModel", runtime: Runtime) -> None:
    """Write an entry, if the runtime runs an export and gives PyTorch's vectors.

    A cache that cannot be written only makes later starts slower.
    """
    if not request.may_use_export or not isinstance(runtime, ExportRuntime):
        return
    probe = Probe.synthetic(adapter.preprocess.size)
    texts, images = reference_vectors(loaded.model, probe)
    if not prove(adapter, runtime, probe, (texts, images)).holds:
        return
    content = {
        "circumstances": _circumstances(request),
        "runtime": runtime.name,
        "threads": runtime.threads,
        "export": asdict(ExportKey.from_manifest(runtime.directory)),
        "adapter": _fields_of(adapter),
    }
    arrays = _arrays_of(adapter) | {"probe_texts": texts, "probe_images": images, "content": _as_array(content)}
    body = save({name: np.ascontiguousarray(value) for name, value in arrays.items()})
    path = request.file(adapter.fingerprint)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_writer(path, shared=True) as file:
            file.write(hashlib.sha256(body).digest() + body)
    except OSError as error:
        logger.warning("the adapter cannot be cached in %s: %s", path.parent, error.strerror or error)


def restore(request: LoadRequest) -> tuple[Adapter, Runtime] | None:
    """Load the entry that `store` wrote; None if there is none or a check fails."""
    if not request.may_use_export:
        return None
    try:
        return _restore(request)
    except (DcarError, OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        logger.debug("no cached adapter of %s can be used: %s", request.checkpoint, error)
        return None


def has_entry(checkpoint: Path, mark: str, device: str) -> bool:
    """True if `auto` can start from the default cache without measuring. mark: the checkpoint's fingerprint."""
    request = LoadRequest(checkpoint, device, AUTO, None, default_cache_directory())
    return request.may_use_export and request.file(mark).is_file()


def discard(cache: Path, backbone: str) -> None:
    """Remove the entries of a backbone, by its content hash, because its runtimes were ranked anew."""
    for path in directory_in(cache).glob("*"):
        try:
            is_other = json.loads(_read(path)["content"].tobytes())["export"]["backbone"] != backbone
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            is_other = False  # it is of no use
        if not is_other:
            path.unlink(missing_ok=True)


def _restore(request: LoadRequest) -> tuple[Adapter, Runtime] | None:
    described = read_config(request.checkpoint)
    config = ModelConfig.from_dict(described["model"])
    mark = fingerprint(described["backbone"]["sha256"], config, read_trainables(request.checkpoint))
    path = request.file(mark)
    if not path.is_file():
        return None
    arrays = _read(path)
    content = json.loads(arrays["content"].tobytes())
    torch = sys.modules.get("torch")
    if (
        content["circumstances"] != _circumstances(request)
        or content["adapter"]["fingerprint"] != mark
        or (torch is not None and torch.get_num_threads() != content["threads"])
    ):
        return None
    key = ExportKey(**content["export"])
    with ThreadPoolExecutor(1) as pool:
        checked = pool.submit(ensure_export, key, request.cache, None)  # while the export is compiled
        adapter = _adapter_from(content["adapter"], arrays)
        runtime = open_export(content["runtime"], key.directory(request.cache), content["threads"])
        checked.result()
    probe = Probe.synthetic(adapter.preprocess.size)
    proof = prove(adapter, runtime, probe, (arrays["probe_texts"], arrays["probe_images"]))
    return (adapter, runtime) if proof.holds else None


def _read(path: Path) -> Arrays:
    content = path.read_bytes()
    checksum, body = content[:32], content[32:]
    if hashlib.sha256(body).digest() != checksum:
        raise ValueError(f"{path} is corrupted")
    arrays: Arrays = load(body)
    return arrays


def _fields_of(adapter: Adapter) -> dict[str, Any]:
    """The fields that are no arrays."""
    return {
        "fingerprint": adapter.fingerprint,
        "dim": adapter.dim,
        "patch_grid": adapter.patch_grid,
        "uses_token_weights": adapter.uses_token_weights,
        "preprocess": adapter.preprocess.to_dict(),
        "layout": asdict(adapter.layout),
        "text_prompts": [
            len(adapter.text_prompts.inputs),
            adapter.text_prompts.skipped,
            adapter.text_prompts.has_weights,
        ],
    }


def _arrays_of(adapter: Adapter) -> Arrays:
    arrays: Arrays = {"tokenizer": np.frombuffer(adapter.tokenizer.to_bytes(), np.uint8)}
    arrays |= {f"text_prompts.{i}": each for i, each in enumerate(adapter.text_prompts.inputs)}
    for name in ("image_prompts", "token_factors"):
        if (values := getattr(adapter, name)) is not None:
            arrays[name] = values
    for name in _BOTTLENECKS:
        if (bottleneck := getattr(adapter, name)) is not None:
            arrays |= {f"{name}.{part}": values for part, values in vars(bottleneck).items()}
    return arrays


def _adapter_from(fields: dict[str, Any], arrays: Arrays) -> Adapter:
    preprocess = fields["preprocess"]
    count, skipped, has_weights = fields["text_prompts"]
    parts = ("down", "down_bias", "up", "up_bias")
    bottlenecks = {
        name: Bottleneck(*(arrays[f"{name}.{part}"] for part in parts)) if f"{name}.down" in arrays else None
        for name in _BOTTLENECKS
    }
    return Adapter(
        fingerprint=fields["fingerprint"],
        dim=fields["dim"],
        patch_grid=fields["patch_grid"],
        uses_token_weights=fields["uses_token_weights"],
        preprocess=Preprocess(**{**preprocess, "mean": tuple(preprocess["mean"]), "std": tuple(preprocess["std"])}),
        tokenizer=TextTokenizer.from_bytes(arrays["tokenizer"].tobytes()),
        layout=TextLayout(**fields["layout"] | {"start_ids": tuple(fields["layout"]["start_ids"])}),
        text_prompts=TextPrompts(tuple(arrays[f"text_prompts.{i}"] for i in range(count)), skipped, has_weights),
        image_prompts=arrays.get("image_prompts"),
        token_factors=arrays.get("token_factors"),
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


def _as_array(content: dict[str, Any]) -> NDArray[np.uint8]:
    return np.frombuffer(json.dumps(content).encode(), np.uint8)
