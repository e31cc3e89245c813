"""What the other rooms use: text or pictures in, normalised float32 vectors out.

from dcar_core import Encoder
encoder = Encoder.load("examples/emoji/twemoji/checkpoint")
vectors = encoder.encode_text(["crying cat"])          # float32 (1, E)

What one checkpoint has of its own is a `Domain`; what runs the towers is a `Runtime`, chosen by name or by measuring.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dcar_core.backbone import Backbone, BackboneSource, load_backbone
from dcar_core.checkpoint import fingerprint, is_checkpoint, load_checkpoint, read_config
from dcar_core.config import LossConfig, ModelConfig, PromptConfig, ReweightConfig
from dcar_core.domain import Domain
from dcar_core.errors import ModelError
from dcar_core.images import ImageSource
from dcar_core.mapped import release
from dcar_core.model import DCAR
from dcar_core.runtimes.exports import default_cache
from dcar_core.runtimes.protocol import Runtime
from dcar_core.runtimes.registry import Target, require_known
from dcar_core.runtimes.selection import load_runtime

PLAIN_CLIP = ModelConfig(
    method="clip",
    prompt=PromptConfig(length=0),
    reweight=ReweightConfig(train="none"),
    loss=LossConfig(category=0, head=0),
)


class Encoder:
    """A model ready to encode. Build it with `load`; `fingerprint` names what its vectors may be compared with."""

    def __init__(self, domain: Domain, target: Target, runtime: Runtime, *, exact: bool = False) -> None:
        self.domain = domain
        self.target = target
        self.runtime = runtime
        self.model = domain.model
        self.fingerprint = target.fingerprint
        self.dim = domain.dim
        preprocess = self.model.backbone.preprocess
        self.preprocess = preprocess if exact else preprocess.fast()

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
        backbone: Backbone | None = None,
    ) -> "Encoder":
        """Load a checkpoint directory, a model directory, or an open_clip model by name.

        Args:
            source: a directory with config.json (DCAR checkpoint) or open_clip_config.json (plain CLIP), or a name
                such as ViT-B-32-quickgelu.
            pretrained: weights for a name: a tag (openai, laion2b_s34b_b79k, ..) or a .safetensors / .pt file.
            device: "auto" takes a GPU when there is one; or cpu, cuda, cuda:1, mps.
            exact: pictures to pixels bit for bit as open_clip does it, instead of the fast mode of `Preprocess`.
            runtime: what runs the towers: "torch", "auto" (the fastest that is right here, measured once), or another
                name of `runtimes.registry.KINDS`.
            cache: where exports and measurements are kept; default: the user's cache directory.
            backbone: one that is loaded already, for a checkpoint made on the same weights to share.

        Raises:
            CheckpointError, ModelError: with what to do.
            RuntimeUnavailableError, MissingExtraError: the runtime that was named cannot be had here.
        """
        require_known(runtime)
        device = pick_device(device)
        path = Path(source)
        if is_checkpoint(path):
            model, mark = load_checkpoint(path, device=device, backbone=backbone)
            backbone_hash = str(read_config(path)["backbone"]["sha256"])  # load_checkpoint has compared it
        else:
            model = DCAR(load_backbone(BackboneSource(str(source), pretrained), device), PLAIN_CLIP)
            backbone_hash = model.backbone.content_hash()
            mark = fingerprint(backbone_hash, PLAIN_CLIP, {})
        domain = Domain(model.eval())
        target = Target(model.backbone, backbone_hash, domain.depth, mark, cache or default_cache())
        return cls(domain, target, load_runtime(runtime, domain, target), exact=exact)

    def with_runtime(self, name: str) -> "Encoder":
        """The same encoder on another runtime.

        Raises:
            RuntimeUnavailableError, MissingExtraError: it cannot be had here.
        """
        runtime = load_runtime(name, self.domain, self.target)
        return Encoder(self.domain, self.target, runtime, exact=self.preprocess.exact)

    def encode_text(self, texts: Sequence[str], batch_size: int = 64) -> NDArray[np.float32]:
        """Texts -> float32 (n, E), L2-normalised. What exceeds the context is cut.

        Batches are formed by length, so that a short text is not padded to a long one's size.
        """
        return self.domain.encode_text(self.runtime, texts, batch_size)

    def encode_images(self, images: Sequence[ImageSource], batch_size: int = 32) -> NDArray[np.float32]:
        """Pictures (PIL, path or bytes) -> float32 (n, E), L2-normalised.

        Raises:
            ImageError: a picture cannot be read.
        """
        out = np.empty((len(images), self.dim), np.float32)
        for start in range(0, len(images), batch_size):
            part = images[start : start + batch_size]
            out[start : start + len(part)] = self.encode_pixels(np.stack([self.preprocess(image) for image in part]))
        return out

    def encode_pixels(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 (n, 3, S, S), from `preprocess` -> float32 (n, E), L2-normalised, in one forward pass."""
        return self.domain.encode_pixels(self.runtime, pixels)

    def release(self) -> None:
        """Let go of what only loading needed, as far as it can be read again from its file: see `mapped`."""
        source = self.model.backbone.source
        release([Path(source.model), Path(source.pretrained or source.model), self.target.cache])


def pick_device(device: str) -> str:
    """ "auto" -> cuda, mps or cpu, whichever there is.

    Raises:
        ModelError: the device that was named is not there.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"there is no device {device!r} here: {str(error).splitlines()[0]}") from error
    return device
