"""What the other rooms use: text or pictures in, normalised float32 vectors out.

from dcar_core import Encoder
encoder = Encoder.load("examples/emoji/twemoji/checkpoint")
vectors = encoder.encode_text(["crying cat"])          # float32 (1, E)

What one checkpoint has of its own is a `Adapter`; what runs the towers is a `Runtime`, chosen by name or by measuring.
The model itself is loaded where these two do not exist yet, and for whoever asks for it.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dcar_core.images import ImageSource
from dcar_core.model.checkpoint import fingerprint, is_checkpoint, load_checkpoint, read_config
from dcar_core.model.methods import method
from dcar_core.runtimes.adapter import Adapter
from dcar_core.runtimes.export_cache import default_cache_directory
from dcar_core.runtimes.protocol import ExportRuntime, Runtime
from dcar_core.runtimes.registry import LoadedModel, require_known
from dcar_core.serving import adapter_cache
from dcar_core.util.errors import ImageError, ModelError
from dcar_core.util.memory import release_pages, trim_heap

if TYPE_CHECKING:
    from dcar_core.model.backbone import Backbone
    from dcar_core.model.dcar import DCAR


@dataclass(frozen=True)
class DeferredModel:
    """A model that is not in memory: the places where its checkpoint lies, and what loads it from one of them."""

    paths: tuple[Path, ...]
    load: Callable[[Path], LoadedModel]


class Encoder:
    """A model ready to encode. Build it with `load`; `fingerprint` names what its vectors may be compared with."""

    def __init__(
        self, adapter: Adapter, loaded: LoadedModel | DeferredModel, runtime: Runtime, *, exact: bool = False
    ) -> None:
        self.adapter = adapter
        self.runtime = runtime
        self.fingerprint = adapter.fingerprint
        self.dim = adapter.dim
        with_torch = not isinstance(runtime, ExportRuntime)  # which is in memory then anyway
        self.preprocess = adapter.preprocess if exact else adapter.preprocess.fast(torch=with_torch)
        self._target = loaded
        self._turn = threading.Lock()

    @property
    def loaded(self) -> LoadedModel:
        """The model and what belongs to it; loaded now if nothing has needed it so far, which takes seconds.

        Raises:
            CheckpointError, ModelError: it cannot be loaded any more.
        """
        with self._turn:
            if isinstance(self._target, DeferredModel):
                paths = self._target.paths
                self._target = self._target.load(next(filter(is_checkpoint, paths), paths[0]))
            return self._target

    def add_checkpoint_path(self, path: Path) -> None:
        """Its checkpoint lies there as well; where it was it may be deleted before anything asks for the model."""
        with self._turn:
            if isinstance(self._target, DeferredModel):
                others = (other for other in self._target.paths if other != path and is_checkpoint(other))
                self._target = replace(self._target, paths=(path, *others))

    @property
    def model(self) -> "DCAR":
        """See `loaded`."""
        return self.loaded.model

    @property
    def backbone(self) -> "Backbone | None":
        """The model's, if it is in memory."""
        return self._target.backbone if isinstance(self._target, LoadedModel) else None

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        pretrained: str | None = None,
        device: str = "auto",
        exact: bool = False,
        runtime: str = "torch",
        cache: Path | None = None,
        backbone: "Backbone | None" = None,
        threads: int | None = None,
    ) -> "Encoder":
        """Load a checkpoint directory, a model directory, or an open_clip model by name.

        A checkpoint whose towers an exported graph runs is kept for later starts: they need neither the model nor
        PyTorch until something asks for them.

        Args:
            source: a directory with config.json (DCAR checkpoint) or open_clip_config.json (plain CLIP), or a name
                such as ViT-B-32-quickgelu.
            pretrained: weights for a name: a tag (openai, laion2b_s34b_b79k, ..) or a .safetensors / .pt file.
            device: "auto" takes a GPU when there is one; or cpu, cuda, cuda:1, mps.
            exact: pictures to pixels bit for bit as open_clip does it, instead of the fast mode of `Preprocess`.
            runtime: what runs the towers: "torch", "auto" (the fastest that is right here, measured once), or another
                name of `runtimes.registry.RUNTIME_KINDS`.
            cache: where exports and measurements are kept; default: the user's cache directory.
            backbone: one that is loaded already, for a checkpoint made on the same weights to share.
            threads: of the towers; default: PyTorch's own number.

        Raises:
            CheckpointError, ModelError: with what to do.
            RuntimeUnavailableError, MissingExtraError: the runtime that was named cannot be had here.
        """
        require_known(runtime)
        path, cache = Path(source), cache or default_cache_directory()

        def whole(path: Path) -> LoadedModel:
            if threads is not None:
                import torch

                torch.set_num_threads(threads)
            return _load(path, str(source), pretrained, pick_device(device), cache, backbone)

        wanted = adapter_cache.LoadRequest(path, device, runtime, threads, cache) if is_checkpoint(path) else None
        if wanted is not None and (found := adapter_cache.restore(wanted)) is not None:
            adapter, graph = found
            return cls(adapter, DeferredModel((path,), whole), graph, exact=exact)

        from dcar_core.serving.adapter_extraction import extract
        from dcar_core.serving.runtime_selection import load_runtime

        loaded = whole(path)
        adapter = extract(loaded.model, loaded.fingerprint)
        encoder = cls(adapter, loaded, load_runtime(runtime, adapter, loaded), exact=exact)
        if wanted is not None:
            adapter_cache.store(wanted, adapter, loaded, encoder.runtime)
        return encoder

    def with_runtime(self, name: str) -> "Encoder":
        """The same encoder, and the same way from pictures to pixels, on another runtime.

        Raises:
            RuntimeUnavailableError, MissingExtraError: it cannot be had here.
        """
        from dcar_core.serving.runtime_selection import load_runtime

        runtime = load_runtime(name, self.adapter, self.loaded)
        encoder = Encoder(self.adapter, self.loaded, runtime)
        encoder.preprocess = self.preprocess
        return encoder

    def encode_text(self, texts: Sequence[str], batch_size: int = 64) -> NDArray[np.float32]:
        """Texts -> float32 (n, E), L2-normalised. What exceeds the context is cut.

        Batches are formed by length, so that a short text is not padded to a long one's size.

        Raises:
            TypeError: one text in place of several, or what is no text among them.
        """
        if (
            isinstance(texts, str)
            or not isinstance(texts, Sequence)
            or not all(isinstance(each, str) for each in texts)
        ):
            raise TypeError("encode_text takes a list of texts, such as [text]")
        return self.adapter.encode_text(self.runtime, texts, batch_size)

    def encode_images(self, images: Sequence[ImageSource], batch_size: int = 32) -> NDArray[np.float32]:
        """Pictures (PIL, path or bytes) -> float32 (n, E), L2-normalised.

        Raises:
            ImageError: a picture cannot be read; names it, if it is given by its path.
            TypeError: one picture in place of several.
        """
        if isinstance(images, str | bytes | Path | Image.Image):
            raise TypeError("encode_images takes a list of pictures, such as [picture]")
        out = np.empty((len(images), self.dim), np.float32)
        for start in range(0, len(images), batch_size):
            part = images[start : start + batch_size]
            out[start : start + len(part)] = self.encode_pixels(np.stack([self._read(image) for image in part]))
        return out

    def _read(self, image: ImageSource) -> NDArray[np.uint8]:
        if not isinstance(image, Image.Image | str | bytes | Path):
            raise TypeError(f"encode_images takes PIL images, paths or bytes, not {type(image).__name__}")
        try:
            return self.preprocess(image)
        except ImageError as error:
            raise (ImageError(f"{image}: {error}") if isinstance(image, str | Path) else error) from None

    def encode_pixels(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 (n, 3, S, S), from `preprocess` -> float32 (n, E), L2-normalised, in one forward pass."""
        return self.adapter.encode_pixels(self.runtime, pixels)

    def release(self) -> None:
        """Let go of what only loading needed, as far as it can be read again from its file: see `mapped`."""
        places = [self.runtime.directory] if isinstance(self.runtime, ExportRuntime) else []
        if self.backbone is not None:
            source = self.backbone.source
            places += [Path(source.model), Path(source.pretrained or source.model)]
        release_pages(places)
        trim_heap()


def _load(
    path: Path, name: str, pretrained: str | None, device: str, cache: Path, backbone: "Backbone | None"
) -> LoadedModel:
    if is_checkpoint(path):
        model, mark = load_checkpoint(path, device=device, backbone=backbone)
        backbone_hash = str(read_config(path)["backbone"]["sha256"])  # load_checkpoint has compared it
    else:
        from dcar_core.model.backbone import BackboneSource, load_backbone
        from dcar_core.model.dcar import DCAR

        model = DCAR(load_backbone(BackboneSource(name, pretrained), device), method("clip"))
        backbone_hash = model.backbone.content_hash()
        mark = fingerprint(backbone_hash, model.config, {})
    prompts = model.config.prompt
    depth = prompts.depth if model.prompts is not None and prompts.image else 0
    return LoadedModel(model.eval(), backbone_hash, depth, mark, cache)


def pick_device(device: str) -> str:
    """ "auto" -> cuda, mps or cpu, whichever there is.

    Raises:
        ModelError: the device that was named is not there.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"there is no device {device!r} here: {str(error).splitlines()[0]}") from error
    return device
