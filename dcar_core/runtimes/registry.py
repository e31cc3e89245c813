"""The runtimes by name, what each needs, and how one is opened for a model.

- A runtime belongs to a backbone: encoders that share one share it as well, so that their queries can share a batch.
- One that runs an export needs only that to be opened, neither the model nor PyTorch: see `open_export`.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dcar_core.runtimes.export_cache import ExportKey, ensure_export
from dcar_core.runtimes.protocol import ExportRuntime, Runtime
from dcar_core.util import cpu_features
from dcar_core.util.errors import RuntimeUnavailableError

if TYPE_CHECKING:
    from dcar_core.model.backbone import Backbone
    from dcar_core.model.dcar import DCAR
    from dcar_core.runtimes.graph_modules import ImageTower, TextTower

Precision = Literal["fp32", "bf16", "fp16", "int8"]


@dataclass(frozen=True)
class Kind:
    """needs: what the processor must be able to do. on: where it runs. extra: what must be installed."""

    name: str
    precision: Precision
    on: Literal["any", "cpu", "cuda"] = "cpu"
    needs: Literal["bf16", "int8"] | None = None
    extra: str | None = None


RUNTIME_KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("torch", "fp32", "any"),
        Kind("torch-bf16", "bf16", needs="bf16"),
        Kind("torch-compile", "bf16", needs="bf16"),
        Kind("onnx", "fp32", extra="onnx"),
        Kind("onnx-int8", "int8", needs="int8", extra="onnx"),
        Kind("openvino", "fp32", extra="openvino"),
        Kind("openvino-bf16", "bf16", needs="bf16", extra="openvino"),
        Kind("openvino-int8", "int8", needs="int8", extra="openvino"),
        Kind("cuda-fp16", "fp16", "cuda"),
        Kind("cuda-bf16", "bf16", "cuda"),
    )
}
AUTO = "auto"


@dataclass(frozen=True)
class LoadedModel:
    """What a runtime is opened for. backbone_hash: as `Backbone.content_hash`; depth: of the image prompts."""

    model: "DCAR"
    backbone_hash: str
    depth: int
    fingerprint: str
    cache: Path

    @property
    def backbone(self) -> "Backbone":
        return self.model.backbone

    def key(self, runtime: str, library: str, *, calibrated: bool = False) -> ExportKey:
        mark = self.fingerprint if calibrated else ""
        return ExportKey(runtime, self.backbone_hash, self.depth, library, mark)


def require_known(name: str) -> None:
    """
    Raises:
        RuntimeUnavailableError: there is no such runtime; the message lists those that exist.
    """
    if name != AUTO and name not in RUNTIME_KINDS:
        raise RuntimeUnavailableError(f"no runtime is named {name!r}; there are: {AUTO}, {', '.join(RUNTIME_KINDS)}")


_open: "weakref.WeakKeyDictionary[Backbone, dict[str, Runtime]]" = weakref.WeakKeyDictionary()
_exports: "weakref.WeakValueDictionary[tuple[str, Path, int], ExportRuntime]" = weakref.WeakValueDictionary()


def open_runtime(name: str, loaded: LoadedModel) -> Runtime:
    """A runtime by name; the one that is open for this backbone already, if there is one.

    Raises:
        RuntimeUnavailableError: it cannot be had here; the message is the reason.
        MissingExtraError: an optional dependency is not installed.
    """
    require_known(name)
    kind, opened = RUNTIME_KINDS[name], _open.setdefault(loaded.backbone, {})
    device = loaded.backbone.device.type
    if kind.on not in ("any", device):
        where = "a GPU (--device cuda)" if kind.on == "cuda" else "the processor (--device cpu)"
        raise RuntimeUnavailableError(f"the runtime {name} needs {where}, but the device is {device}")
    _require_instructions(kind)
    depth = loaded.depth if kind.extra else "any"
    key = f"{name} {depth} {loaded.fingerprint if name == 'openvino-int8' else ''}"
    if key not in opened:
        opened[key] = _OPENERS[name.partition("-")[0]](kind, loaded)
    return opened[key]


def open_export(name: str, directory: Path, threads: int) -> ExportRuntime:
    """A runtime on an export that has been checked; the one that is open already, if there is one.

    Raises:
        RuntimeUnavailableError, MissingExtraError: it cannot be had here; the message is the reason.
    """
    kind, key = RUNTIME_KINDS[name], (name, directory.resolve(), threads)
    _require_instructions(kind)
    found = _exports.get(key)
    if found is None:
        if kind.name.startswith("onnx"):
            from dcar_core.runtimes.onnx_graph import OnnxRuntime

            found = OnnxRuntime(name, directory, threads=threads)
        else:
            from dcar_core.runtimes.openvino_graph import OpenVinoRuntime

            hint = "bf16" if cpu_features.missing_instructions("bf16") is None and kind.precision != "fp32" else "f32"
            found = OpenVinoRuntime(name, directory, hint=hint, threads=threads)
        _exports[key] = found
    return found


def _require_instructions(kind: Kind) -> None:
    if kind.needs is not None and (reason := cpu_features.missing_instructions(kind.needs)):
        raise RuntimeUnavailableError(f"the runtime {kind.name} cannot be used: {reason}")


def towers(loaded: LoadedModel) -> "tuple[TextTower, ImageTower]":
    """
    Raises:
        RuntimeUnavailableError: the backbone's blocks are of a kind that only `torch` runs.
    """
    from dcar_core.runtimes.graph_modules import ImageTower, TextTower

    return TextTower(loaded.backbone).eval(), ImageTower(loaded.backbone, loaded.depth).eval()


def _open_torch(kind: Kind, loaded: LoadedModel) -> Runtime:
    import torch

    from dcar_core.runtimes.eager import PlainRuntime, TorchRuntime

    try:
        text, image = towers(loaded)
    except RuntimeUnavailableError:
        if kind.name != "torch":
            raise
        itself: Any = weakref.proxy(loaded.backbone)  # not to be kept alive by its own entry in `_open`
        return PlainRuntime(itself)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(kind.precision, torch.float32)
    compiled = kind.name == "torch-compile" or kind.on == "cuda"
    return TorchRuntime(kind.name, text, image, dtype, compiled=compiled)


def _open_openvino(kind: Kind, loaded: LoadedModel) -> Runtime:
    from dcar_core.runtimes import openvino_graph as graph

    version = graph.version()
    int8 = kind.precision == "int8"
    if int8:
        directory = _calibrated(kind, loaded, version)
    else:
        directory = ensure_export(
            loaded.key("openvino", version), loaded.cache, lambda path: graph.write(path, *towers(loaded))
        )
    return open_export(kind.name, directory, _threads())


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _calibrated(kind: Kind, loaded: LoadedModel, version: str) -> Path:
    key = loaded.key(kind.name, version, calibrated=True)
    if not key.directory(loaded.cache).is_dir():
        raise RuntimeUnavailableError(
            f"the runtime {kind.name} must first be calibrated on your pictures and captions: "
            f"dcar benchmark --checkpoint DIR --data PATH"
        )
    return ensure_export(key, loaded.cache, None)


def _open_onnx(kind: Kind, loaded: LoadedModel) -> Runtime:
    from dcar_core.runtimes import onnx_graph as graph

    version = graph.version()
    directory = ensure_export(
        loaded.key("onnx", version), loaded.cache, lambda path: graph.write(path, *towers(loaded))
    )
    if kind.precision == "int8":
        exact = directory
        directory = ensure_export(
            loaded.key(kind.name, version), loaded.cache, lambda path: graph.write_int8(path, exact)
        )
    return open_export(kind.name, directory, _threads())


_OPENERS: dict[str, Callable[[Kind, LoadedModel], Runtime]] = {
    "torch": _open_torch,
    "cuda": _open_torch,
    "onnx": _open_onnx,
    "openvino": _open_openvino,
}
