"""`Encoder`, the interface of `dcar_core` for other packages: texts or images in,
normalized float32 vectors out.

    from dcar_core import Encoder
    encoder = Encoder.load("examples/emoji/twemoji/checkpoint")
    vectors = encoder.encode_text(["crying cat"])  # float32 (1, E)

An `EncoderState` holds the arrays of one checkpoint; a `Runtime`, chosen by name or by
a rule, runs the towers. The model itself is loaded if these two are not cached, and
when `Encoder.model` is used.
"""

import logging
import shutil
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from shutil import copyfile
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from dcar_core.encoder import exports
from dcar_core.encoder.clip_graphs import load_state, open_clip_graphs
from dcar_core.encoder.runtimes import AUTO, auto_exports, check_runtime, load_runtime
from dcar_core.encoder.state import EncoderState, OpenVinoRuntime, Runtime, normalize
from dcar_core.images import ImageSource
from dcar_core.model.checkpoint import (
    PORTABLE,
    Trainables,
    backbone_source,
    compute_fingerprint,
    is_checkpoint,
    load_checkpoint,
    read_config,
    read_verified,
)
from dcar_core.model.clip_files import read_clip_files
from dcar_core.model.config import UNTOUCHED, BackboneSource
from dcar_core.util.arrays import Floats, Pixels
from dcar_core.util.errors import (
    CheckpointError,
    ImageError,
    MissingExtraError,
    ModelError,
    RuntimeUnavailableError,
    requires_pytorch,
)
from dcar_core.util.files import default_cache_directory, link_or_copy
from dcar_core.util.machine import is_installed, release_pages, trim_heap

if TYPE_CHECKING:
    from dcar_core.model.backbone import Backbone
    from dcar_core.model.dcar import DCAR

logger = logging.getLogger(__name__)


class Encoder:
    """A model ready to encode. Build it with `load`; only vectors of one `fingerprint`
    may be compared.
    """

    def __init__(
        self,
        state: EncoderState,
        model: "DCAR | None",
        runtime: Runtime,
        *,
        exact: bool = False,
        load_model: "Callable[[Path], DCAR] | None" = None,
    ) -> None:
        """model: None to load it by `load_model` from a checkpoint of
        `add_checkpoint_path` when something needs it.
        """
        self.state = state
        self.runtime = runtime
        self.fingerprint = state.fingerprint
        self.image_key = state.image_key
        self.dim = state.dim
        has_torch = not isinstance(runtime, OpenVinoRuntime)
        self.preprocess = (
            state.preprocess if exact else state.preprocess.fast(torch=has_torch)
        )
        self._model = model
        self._load_model = load_model
        self._checkpoints = list[Path]()
        self._turn = threading.Lock()

    @property
    def model(self) -> "DCAR":
        """The model; the first call may have to load it, which takes seconds."""
        with self._turn:
            if self._model is None:
                assert self._load_model is not None
                self._model = self._load_model(
                    next(filter(is_checkpoint, self._checkpoints), self._checkpoints[0])
                )
            return self._model

    def add_checkpoint_path(self, path: Path) -> None:
        """Name another copy of the checkpoint, since the first may be deleted before
        anything needs the model.
        """
        with self._turn:
            others = (
                other
                for other in self._checkpoints
                if other != path and is_checkpoint(other)
            )
            self._checkpoints = [path, *others]

    @property
    def backbone(self) -> "Backbone | None":
        """The model's backbone, if it is in memory."""
        return None if self._model is None else self._model.backbone

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        pretrained: str | None = None,
        device: str = "auto",
        exact: bool = False,
        runtime: str = "",
        cache: Path | None = None,
        backbone: "Backbone | None" = None,
        threads: int | None = None,
    ) -> "Encoder":
        """Load a checkpoint directory, a model directory, or an open_clip model by
        name.

        Args:
            source: a directory with config.json (DCAR checkpoint) or
                open_clip_config.json (plain CLIP), or a name.
            pretrained: weights for a name: a tag (openai, laion2b_s34b_b79k, ..) or a
                .safetensors / .pt file.
            device: "auto" takes a GPU when there is one; or cpu, cuda, cuda:1, mps.
            exact: preprocess images bit for bit as open_clip does, instead of the fast
                mode of `Preprocess`.
            runtime: "auto" (by what is installed and the processor has), or a name of
                `encoder.runtimes.RUNTIMES`. Default: float32, by PyTorch if it is
                installed.
            cache: directory of exports; default: the user's cache directory.
            backbone: a loaded one, for a checkpoint made on the same weights to share.
            threads: of the towers; default: PyTorch's own number, or the available
                cores without it.

        Raises:
            CheckpointError, ModelError: with what to do.
            RuntimeUnavailableError, MissingExtraError: the named runtime cannot be used
            here.
        """
        runtime = runtime or ("torch" if is_installed("torch") else "openvino")
        check_runtime(runtime)
        path = Path(source)
        cache = cache or default_cache_directory()

        def load_model(path: Path) -> "tuple[DCAR, str, str]":
            if threads is not None:
                import torch

                torch.set_num_threads(threads)
            if is_checkpoint(path):
                model, fingerprint = load_checkpoint(
                    path,
                    device=pick_device(device),
                    backbone=backbone,
                )
                # load_checkpoint has compared it
                backbone_hash = str(read_config(path)["backbone"]["sha256"])
            else:
                from dcar_core.model.backbone import load_backbone
                from dcar_core.model.dcar import DCAR

                named = load_backbone(
                    BackboneSource(str(source), pretrained), pick_device(device)
                )
                model = DCAR(named, UNTOUCHED)
                backbone_hash = named.content_hash()
                fingerprint = compute_fingerprint(backbone_hash, model.config, {})
            return model.eval(), backbone_hash, fingerprint

        may_use_openvino = exports.may_use_export(device, runtime)
        if may_use_openvino:
            opened = _load_files(
                path,
                BackboneSource(str(source), pretrained),
                runtime,
                threads,
            )
            if opened is None and is_checkpoint(path):
                opened = exports.restore(path, runtime, threads, cache)
            if opened is not None:
                encoder = cls(
                    opened[0],
                    None,
                    opened[1],
                    exact=exact,
                    load_model=lambda path: load_model(path)[0],
                )
                encoder.add_checkpoint_path(path)
                return encoder

        with requires_pytorch(
            f"loading {source} without a portable export for this runtime"
        ):
            from dcar_core.encoder.graphs import extract_state

            model, backbone_hash, fingerprint = load_model(path)
        state = extract_state(model, fingerprint, backbone_hash)
        chosen = load_runtime(
            runtime,
            state,
            model,
            partial(exports.ensure_export, model, backbone_hash, cache),
        )
        if (
            may_use_openvino
            and is_checkpoint(path)
            and isinstance(chosen, OpenVinoRuntime)
        ):
            exports.store(chosen.directory, state, model)
        return cls(state, model, chosen, exact=exact)

    def encode_text(self, texts: Sequence[str], batch_size: int = 64) -> Floats:
        """Encode texts -> float32 (n, E), L2-normalized. Texts beyond the context are
        cut.
        """
        if isinstance(texts, str):
            raise TypeError("encode_text takes a list of texts, such as [text]")
        if not texts:
            return np.empty((0, self.dim), np.float32)
        return self.runtime.encode_texts(
            [(self.state, text) for text in texts], batch_size
        )

    def encode_images(
        self,
        images: Sequence[ImageSource],
        batch_size: int = 32,
    ) -> Floats:
        """Encode images (PIL, path or bytes) -> float32 (n, E), L2-normalized. Raise
        ImageError for a broken one.
        """
        if isinstance(images, str | bytes | Path | Image.Image):
            raise TypeError("encode_images takes a list of images, such as [image]")
        out = np.empty((len(images), self.dim), np.float32)
        for start in range(0, len(images), batch_size):
            part = images[start : start + batch_size]
            out[start : start + len(part)] = self.encode_pixels(
                np.stack([self._read(image) for image in part])
            )
        return out

    def _read(self, image: ImageSource) -> Pixels:
        try:
            return self.preprocess(image)
        except ImageError as error:
            raise (
                ImageError(f"{image}: {error}")
                if isinstance(image, str | Path)
                else error
            ) from None

    def encode_pixels(self, pixels: Pixels) -> Floats:
        """uint8 (n, 3, S, S), from `preprocess` -> float32 (n, E), L2-normalized, in
        one forward pass.
        """
        return self.state.adapt_images(self.image_features(pixels))

    def image_features(self, pixels: Pixels) -> Floats:
        """Encode as `encode_pixels`, before the adapter of image features; `image_key`
        names what decides on these.
        """
        return normalize(self.runtime.image(pixels, self.state.image_inputs))

    def release(self) -> None:
        """Release memory that only loading needed and that can be read again from its
        file; see `util.machine`.
        """
        if isinstance(self.runtime, OpenVinoRuntime):
            paths = [self.runtime.directory]
        else:
            paths = []
        release_pages(
            [*paths, self.backbone.source.weights_file]
            if self.backbone is not None
            else paths
        )
        trim_heap()


def _load_files(
    path: Path,
    source: BackboneSource,
    runtime: str,
    threads: int | None,
) -> tuple[EncoderState, Runtime] | None:
    """Load a checkpoint, or else a model, of CLIP's own family; None for any other, or
    if nothing of `auto` runs it.
    """
    names = [runtime] if runtime != AUTO else auto_exports()
    clip = read_clip_files(backbone_source(path) if is_checkpoint(path) else source)
    if clip is None:
        return None
    backbone_hash = clip.content_hash()
    config = UNTOUCHED
    trainables = Trainables()
    fingerprint = compute_fingerprint(backbone_hash, config, trainables)
    if is_checkpoint(path):
        config, trainables, fingerprint = read_verified(
            path,
            clip.source,
            backbone_hash,
        )
    try:
        state = load_state(clip, config, trainables, (fingerprint, backbone_hash))
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    for name in names:
        try:
            return state, open_clip_graphs(name, clip, config, backbone_hash, threads)
        except RuntimeUnavailableError as error:
            if runtime != AUTO:
                raise
            logger.warning("%s", error)
    return None


def add_portable_export(checkpoint: Path, backbone: "Backbone | None") -> None:
    """Put what serves a checkpoint without PyTorch into it: the files of its model, or
    an export.

    A model without an export is a warning. backbone: of the checkpoint, if it is in
    memory; one on the CPU saves a second copy.
    """
    portable = checkpoint / PORTABLE
    if backbone is not None and backbone.device.type == "cpu":
        shared = backbone
    else:
        shared = None
    shutil.rmtree(portable, ignore_errors=True)  # of another release
    if (clip := read_clip_files(backbone_source(checkpoint))) is not None:
        portable.mkdir()
        for file in clip.files:  # a directory's may be written again
            (copyfile if clip.source.directory else link_or_copy)(
                file, portable / file.name
            )
        return
    try:
        encoder = Encoder.load(
            checkpoint,
            device="cpu",
            runtime="openvino",
            backbone=shared,
        )
        assert isinstance(encoder.runtime, OpenVinoRuntime)
        export = encoder.runtime.directory
        entry = export / exports.entry_name(encoder.fingerprint)
        if not entry.is_file():
            raise RuntimeUnavailableError(f"{export} cannot be written")
        exports.copy_export(export, portable)
        link_or_copy(entry, portable / exports.ENTRY)
    except (RuntimeUnavailableError, MissingExtraError) as error:
        logger.warning("services of this model will need PyTorch: %s", error)


def starts_quickly(checkpoint: Path, device: str) -> bool:
    """Return whether `auto` opens a checkpoint without PyTorch: by an export, or as one
    of CLIP's own family.
    """
    return exports.may_use_export(device, AUTO) and (
        exports.has_entry(checkpoint)
        or read_clip_files(backbone_source(checkpoint)) is not None
    )


def load_exact(checkpoint: Path, device: str) -> Encoder:
    """Load a checkpoint in float32 on the runtime that starts soonest: OpenVINO if it
    is ready, or else PyTorch.
    """
    if starts_quickly(checkpoint, device):
        with suppress(MissingExtraError, RuntimeUnavailableError):
            return Encoder.load(checkpoint, device=device, runtime="openvino")
    return Encoder.load(checkpoint, device=device)


def has_started_portable(encoder: Encoder, checkpoint: Path) -> bool:
    """Return whether an encoder runs the portable files of a checkpoint."""
    portable = (checkpoint / PORTABLE).resolve()
    runtime = encoder.runtime
    return (
        isinstance(runtime, OpenVinoRuntime) and runtime.directory.resolve() == portable
    )


def pick_device(device: str) -> str:
    """Resolve "auto" to cuda, mps or cpu, whichever there is. Raise ModelError if the
    named device is not there.
    """
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        if torch.backends.mps.is_available():
            return "mps"
        return "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"there is no device {device!r} here: {str(error).splitlines()[0]}"
        ) from error
    return device
