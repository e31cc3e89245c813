"""The runtimes by name, what each needs, and how one is opened for a model.

- A runtime belongs to a backbone: encoders that share one share it as well, so that their queries can share a batch.
- A runtime on an export needs neither the model nor PyTorch to be opened: see `open_export`.
"""

import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dcar_core.runtimes import openvino_runtime as openvino
from dcar_core.runtimes.encoder_state import EncoderState, Runtime
from dcar_core.runtimes.openvino_runtime import GRAPHS, check_export, ensure_export
from dcar_core.util import machine
from dcar_core.util.arrays import Pixels
from dcar_core.util.errors import RuntimeUnavailableError

if TYPE_CHECKING:
    from dcar_core.model.backbone import Backbone
    from dcar_core.model.dcar import DCAR
    from dcar_core.runtimes.graphs import ImageGraph, TextGraph

AUTO = "auto"
INT8_SAMPLES = 200  # captions and images that int8 is calibrated on; more hardly change the ranges


@dataclass(frozen=True)
class RuntimeKind:
    """A runtime. on: the device. needs: instructions that the processor must have. extra: the optional dependency."""

    precision: Literal["fp32", "bf16", "fp16", "int8"]
    on: Literal["any", "cpu", "cuda"] = "cpu"
    needs: Literal["bf16", "int8"] | None = None
    extra: str | None = None


RUNTIME_KINDS = {
    "torch": RuntimeKind("fp32", "any"),
    "torch-bf16": RuntimeKind("bf16", needs="bf16"),
    "torch-compile": RuntimeKind("bf16", needs="bf16"),
    "openvino": RuntimeKind("fp32", extra="openvino"),
    "openvino-bf16": RuntimeKind("bf16", needs="bf16", extra="openvino"),
    "openvino-int8": RuntimeKind("int8", needs="int8", extra="openvino"),
    "cuda-fp16": RuntimeKind("fp16", "cuda"),
    "cuda-bf16": RuntimeKind("bf16", "cuda"),
}


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
    def backbone(self) -> "Backbone":
        return self.model.backbone

    def graphs(self) -> "tuple[TextGraph, ImageGraph]":
        from dcar_core.runtimes.graphs import ImageGraph, text_graph

        text, image = self.model.config.prompt.depths
        has_adapters = self.model.block_adapters is not None
        return text_graph(self.backbone, text), ImageGraph(self.backbone, image, has_adapters=has_adapters).eval()

    def export_directory(self, *, calibrated: bool = False) -> Path:
        """Return the place of the float32 export, or of the int8 export of this encoder.

        Its name has the depths of image and text prompts, such as d4t0, and "a" for adapters of blocks.
        """
        from dcar_core.runtimes.graphs import PrefixTextGraph

        text, image = self.model.config.prompt.depths
        text = 0 if PrefixTextGraph.fits(self.backbone) else text  # that graph serves every depth
        inputs = f"d{image}t{text}" + ("a" if self.model.block_adapters is not None else "")
        name = f"{self.backbone_hash[:16]}_{inputs}_{'openvino-int8' if calibrated else 'openvino'}"
        owner = f"_{self.fingerprint[:16]}" if calibrated else ""
        return self.cache / "exports" / f"{name}_{openvino.version()}_g{GRAPHS}{owner}"

    def is_calibrated(self) -> bool:
        return self.export_directory(calibrated=True).is_dir()

    def export(self) -> Path:
        """Return the directory of the checked float32 export; make it if there is none."""
        return ensure_export(self.export_directory(), lambda path: openvino.write(path, *self.graphs()))

    def calibrate(self, state: EncoderState, texts: Sequence[str], pixels: Pixels) -> Path:
        """Make the int8 export of this encoder, unless there is one, with at most INT8_SAMPLES of each kind."""
        exact, tokens, prompts = self.export(), state.tokens(texts[:INT8_SAMPLES]), state.text_prompts
        weights, captions = state.query_weights(tokens), []
        for row, length in enumerate(state.text_lengths(tokens)):  # one at a time, so that padding is not measured
            place = slice(row, row + 1), slice(prompts.skipped, int(length))
            captions.append(prompts.graph_inputs(tokens[place], weights[place]))
        images = [(image[None], *state.image_inputs) for image in pixels[:INT8_SAMPLES]]
        inputs = {openvino.TEXT: captions, openvino.IMAGE: images}
        directory = self.export_directory(calibrated=True)
        return ensure_export(directory, lambda path: openvino.write_int8(path, exact, inputs))


_open: "weakref.WeakValueDictionary[Hashable, Runtime]" = weakref.WeakValueDictionary()


def require_known(name: str) -> None:
    """Raise an error that lists all names if there is no such runtime."""
    if name != AUTO and name not in RUNTIME_KINDS:
        raise RuntimeUnavailableError(f"no runtime is named {name!r}; there are: {AUTO}, {', '.join(RUNTIME_KINDS)}")


def open_runtime(name: str, loaded: LoadedModel) -> Runtime:
    """Open a runtime by name, or return the one that is open for this backbone.

    Raise RuntimeUnavailableError, with the reason, or MissingExtraError if it cannot be used here.
    """
    import torch

    require_known(name)
    kind, device = RUNTIME_KINDS[name], loaded.backbone.device.type
    if kind.on not in ("any", device):
        where = "a GPU (--device cuda)" if kind.on == "cuda" else "the processor (--device cpu)"
        raise RuntimeUnavailableError(f"the runtime {name} needs {where}, but the device is {device}")
    _require_instructions(name)
    if kind.precision == "int8":
        if not loaded.is_calibrated():
            raise RuntimeUnavailableError(
                f"the runtime {name} must first be calibrated on your images and captions: "
                f"dcar benchmark --checkpoint DIR --data PATH"
            )
        check_export(loaded.export_directory(calibrated=True))
        return open_export(name, loaded.export_directory(calibrated=True), torch.get_num_threads())
    if kind.extra is not None:
        return open_export(name, loaded.export(), torch.get_num_threads())
    key = name, loaded.backbone
    if (runtime := _open.get(key)) is None:
        from dcar_core.runtimes.graphs import TorchRuntime

        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(kind.precision, torch.float32)
        compiled = name == "torch-compile" or kind.on == "cuda"
        runtime = _open[key] = TorchRuntime(name, *loaded.graphs(), dtype, compiled=compiled)
    return runtime


def open_export(name: str, directory: Path, threads: int) -> Runtime:
    """Open a runtime on a checked export, or return the one that is open; errors as of `open_runtime`."""
    _require_instructions(name)
    key = name, directory.resolve(), threads
    if (runtime := _open.get(key)) is None:
        is_fp32 = RUNTIME_KINDS[name].precision == "fp32" or machine.missing_instructions("bf16") is not None
        hint = "f32" if is_fp32 else "bf16"
        runtime = _open[key] = openvino.OpenVinoRuntime(name, directory, hint=hint, threads=threads)
    return runtime


def _require_instructions(name: str) -> None:
    needs = RUNTIME_KINDS[name].needs
    if needs is not None and (reason := machine.missing_instructions(needs)):
        raise RuntimeUnavailableError(f"the runtime {name} cannot be used: {reason}")
