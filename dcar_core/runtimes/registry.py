"""The runtimes by name, what each needs, and how one is opened for a model.

- A runtime belongs to a backbone: encoders that share one share it as well, so that their queries can share a batch.
- A runtime on an export needs neither the model nor PyTorch to be opened: see `open_export`.
"""

import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dcar_core.runtimes import openvino_graph
from dcar_core.runtimes.export_cache import ExportKey, ensure_export
from dcar_core.runtimes.openvino_graph import OpenVinoRuntime
from dcar_core.runtimes.protocol import Runtime
from dcar_core.util import machine
from dcar_core.util.errors import RuntimeUnavailableError

if TYPE_CHECKING:
    from dcar_core.model.backbone import Backbone
    from dcar_core.model.dcar import DCAR
    from dcar_core.runtimes.graph_modules import ImageGraph
    from dcar_core.runtimes.text_graphs import TextGraph

Precision = Literal["fp32", "bf16", "fp16", "int8"]


@dataclass(frozen=True)
class RuntimeKind:
    """A runtime. needs: instructions that the processor must have. on: the device. extra: the optional dependency."""

    name: str
    precision: Precision
    on: Literal["any", "cpu", "cuda"] = "cpu"
    needs: Literal["bf16", "int8"] | None = None
    extra: str | None = None


RUNTIME_KINDS: dict[str, RuntimeKind] = {
    kind.name: kind
    for kind in (
        RuntimeKind("torch", "fp32", "any"),
        RuntimeKind("torch-bf16", "bf16", needs="bf16"),
        RuntimeKind("torch-compile", "bf16", needs="bf16"),
        RuntimeKind("openvino", "fp32", extra="openvino"),
        RuntimeKind("openvino-bf16", "bf16", needs="bf16", extra="openvino"),
        RuntimeKind("openvino-int8", "int8", needs="int8", extra="openvino"),
        RuntimeKind("cuda-fp16", "fp16", "cuda"),
        RuntimeKind("cuda-bf16", "bf16", "cuda"),
    )
}
AUTO = "auto"


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, and what names its exports.

    backbone_hash: as `Backbone.content_hash`. cache: the directory of exports.
    """

    model: "DCAR"
    backbone_hash: str
    fingerprint: str
    cache: Path

    @property
    def inputs(self) -> str:
        """Inputs of the graphs besides tokens and pixels, as a part of names; see `ExportKey`."""
        from dcar_core.runtimes.text_graphs import PrefixTextGraph

        text, image = self.model.config.prompt.depths
        text = 0 if PrefixTextGraph.fits(self.backbone) else text  # that graph serves every depth
        return f"d{image}t{text}" + ("a" if self.model.block_adapters is not None else "")

    @property
    def backbone(self) -> "Backbone":
        return self.model.backbone

    def export_key(self, runtime: str, library: str, *, calibrated: bool = False) -> ExportKey:
        fingerprint = self.fingerprint if calibrated else ""
        return ExportKey(runtime, self.backbone_hash, self.inputs, library, fingerprint)

    def graphs(self) -> "tuple[TextGraph, ImageGraph]":
        from dcar_core.runtimes.graph_modules import ImageGraph
        from dcar_core.runtimes.text_graphs import text_graph

        text, image = self.model.config.prompt.depths
        has_adapters = self.model.block_adapters is not None
        return text_graph(self.backbone, text), ImageGraph(self.backbone, image, has_adapters=has_adapters).eval()

    def export(self) -> Path:
        """Return the directory of the checked float32 export; make it if there is none."""
        key = self.export_key("openvino", openvino_graph.version())
        return ensure_export(key, self.cache, lambda path: openvino_graph.write(path, *self.graphs()))


def require_known(name: str) -> None:
    """Raise an error that lists all names if there is no such runtime."""
    if name in ("onnx", "onnx-int8"):
        instead = "openvino-int8" if name == "onnx-int8" else "openvino"
        raise RuntimeUnavailableError(
            f"ONNX Runtime is no longer supported; use the runtime {instead} in place of {name}, or {AUTO}"
        )
    if name != AUTO and name not in RUNTIME_KINDS:
        raise RuntimeUnavailableError(f"no runtime is named {name!r}; there are: {AUTO}, {', '.join(RUNTIME_KINDS)}")


_open: "weakref.WeakKeyDictionary[Backbone, dict[str, Runtime]]" = weakref.WeakKeyDictionary()
_exports: "weakref.WeakValueDictionary[tuple[str, Path, int], OpenVinoRuntime]" = weakref.WeakValueDictionary()


def open_runtime(name: str, loaded: LoadedModel) -> Runtime:
    """Open a runtime by name, or return the one that is open for this backbone.

    Raises:
        RuntimeUnavailableError: it cannot be used here; the message is the reason.
        MissingExtraError: an optional dependency is not installed.
    """
    require_known(name)
    kind, opened = RUNTIME_KINDS[name], _open.setdefault(loaded.backbone, {})
    device = loaded.backbone.device.type
    if kind.on not in ("any", device):
        where = "a GPU (--device cuda)" if kind.on == "cuda" else "the processor (--device cpu)"
        raise RuntimeUnavailableError(f"the runtime {name} needs {where}, but the device is {device}")
    _require_instructions(kind)
    inputs = loaded.inputs if kind.extra else "any"
    key = f"{name} {inputs} {loaded.fingerprint if kind.precision == 'int8' else ''}"
    if key not in opened:
        opened[key] = _open_torch(kind, loaded) if kind.extra is None else _open_on_export(kind, loaded)
    return opened[key]


def open_export(name: str, directory: Path, threads: int) -> OpenVinoRuntime:
    """Open a runtime on a checked export, or return the one that is open; errors as of `open_runtime`."""
    kind, key = RUNTIME_KINDS[name], (name, directory.resolve(), threads)
    _require_instructions(kind)
    runtime = _exports.get(key)
    if runtime is None:
        has_bf16 = machine.missing_instructions("bf16") is None
        hint = "bf16" if has_bf16 and kind.precision != "fp32" else "f32"
        runtime = _exports[key] = OpenVinoRuntime(name, directory, hint=hint, threads=threads)
    return runtime


def _require_instructions(kind: RuntimeKind) -> None:
    if kind.needs is not None and (reason := machine.missing_instructions(kind.needs)):
        raise RuntimeUnavailableError(f"the runtime {kind.name} cannot be used: {reason}")


def _open_torch(kind: RuntimeKind, loaded: LoadedModel) -> Runtime:
    import torch

    from dcar_core.runtimes.torch_runtime import TorchRuntime

    text, image = loaded.graphs()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(kind.precision, torch.float32)
    compiled = kind.name == "torch-compile" or kind.on == "cuda"
    return TorchRuntime(kind.name, text, image, dtype, compiled=compiled)


def _open_on_export(kind: RuntimeKind, loaded: LoadedModel) -> Runtime:
    import torch

    if kind.precision != "int8":
        directory = loaded.export()
    else:
        key = loaded.export_key(kind.name, openvino_graph.version(), calibrated=True)
        if not key.directory(loaded.cache).is_dir():
            raise RuntimeUnavailableError(
                f"the runtime {kind.name} must first be calibrated on your images and captions: "
                f"dcar benchmark --checkpoint DIR --data PATH"
            )
        directory = ensure_export(key, loaded.cache, None)
    return open_export(kind.name, directory, torch.get_num_threads())
