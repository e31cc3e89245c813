"""What the other rooms use: text or pictures in, normalised float32 vectors out.

from dcar_core import Encoder
encoder = Encoder.load("examples/emoji/twemoji/checkpoint")
vectors = encoder.encode_text(["crying cat"])          # float32 (1, E)
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dcar_core.backbone import Backbone, BackboneSource, load_backbone
from dcar_core.checkpoint import fingerprint, is_checkpoint, load_checkpoint
from dcar_core.config import LossConfig, ModelConfig, PromptConfig, ReweightConfig
from dcar_core.errors import ModelError
from dcar_core.images import ImageSource
from dcar_core.model import DCAR

PLAIN_CLIP = ModelConfig(
    method="clip",
    prompt=PromptConfig(length=0),
    reweight=ReweightConfig(train="none"),
    loss=LossConfig(category=0, head=0),
)


class Encoder:
    """A model ready to encode. Build it with `load`; `fingerprint` names what its vectors may be compared with."""

    def __init__(self, model: DCAR, fingerprint: str, *, exact: bool = False) -> None:
        self.model = model.eval()
        self.fingerprint = fingerprint
        self.dim = model.backbone.embed_dim
        preprocess = model.backbone.preprocess
        self.preprocess = preprocess if exact else preprocess.fast()

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        pretrained: str | None = None,
        device: str = "auto",
        exact: bool = False,
        backbone: Backbone | None = None,
    ) -> "Encoder":
        """Load a checkpoint directory, a model directory, or an open_clip model by name.

        Args:
            source: a directory with config.json (DCAR checkpoint) or open_clip_config.json (plain CLIP), or a name
                such as ViT-B-32-quickgelu.
            pretrained: weights for a name: a tag (openai, laion2b_s34b_b79k, ..) or a .safetensors / .pt file.
            device: "auto" takes a GPU when there is one; or cpu, cuda, cuda:1, mps.
            exact: pictures to pixels bit for bit as open_clip does it, instead of the fast mode of `Preprocess`.
            backbone: one that is loaded already, for a checkpoint made on the same weights to share.

        Raises:
            CheckpointError, ModelError: with what to do.
        """
        device = pick_device(device)
        path = Path(source)
        if is_checkpoint(path):
            return cls(*load_checkpoint(path, device=device, backbone=backbone), exact=exact)
        backbone = load_backbone(BackboneSource(str(source), pretrained), device)
        return cls(DCAR(backbone, PLAIN_CLIP), fingerprint(backbone.content_hash(), PLAIN_CLIP, {}), exact=exact)

    @torch.inference_mode()
    def encode_text(self, texts: Sequence[str], batch_size: int = 256) -> NDArray[np.float32]:
        """Texts -> float32 (n, E), L2-normalised. What exceeds the context is cut.

        Batches are formed by length, so that a short text is not padded to a long one's size.
        """
        out = np.empty((len(texts), self.dim), np.float32)
        model = self.model
        tokens = model.backbone.tokenize(texts, model.room) if texts else torch.empty(0, 0)
        ends = tokens.argmax(-1) if len(texts) else torch.empty(0)
        order = torch.argsort(ends)
        for start in range(0, len(texts), batch_size):
            rows = order[start : start + batch_size]
            length = int(ends[rows[-1]]) + 1
            out[rows.cpu().numpy()] = model.encode_query(tokens[rows, :length]).float().cpu().numpy()
        return out

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

    @torch.inference_mode()
    def encode_pixels(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 (n, 3, S, S), from `preprocess` -> float32 (n, E), L2-normalised, in one forward pass.

        A GPU is sent bytes, a quarter of the floats, and computes in half precision where that loses nothing.
        """
        device = self.model.backbone.device
        mean, std = (
            torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (self.preprocess.mean, self.preprocess.std)
        )
        batch = torch.from_numpy(pixels).to(device).float().div_(255).sub_(mean).div_(std)
        with torch.autocast("cuda", torch.float16, enabled=device.type == "cuda"):
            return self.model.encode_image(batch).float().cpu().numpy()


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
