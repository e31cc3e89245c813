"""A split prepared for the training loop: images, tokens and the frozen features that
the method needs.

- A tower without trained parts (both towers of CLIP-Adapter, CoOp's image tower)
  contributes frozen features only. Its images are not even decoded once the features
  are in the cache.
- A cache keeps decoded images and frozen features on disk, computed once for all runs
  on a data set. An entry's key covers everything it depends on: the backbone's content
  hash, the image bytes and the texts. It never goes stale.
- An entry is one file of NumPy's, written atomically. Deleting the directory is always
  safe.
"""

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from dcar_core.data import CleaningReport, Dataset, Sample
from dcar_core.data.samples import fold_text
from dcar_core.model.backbone import Backbone
from dcar_core.model.config import ReweightConfig
from dcar_core.model.dcar import DCAR
from dcar_core.model.token_weights import (
    blend,
    image_features,
    pair_weights,
    token_text_features,
)
from dcar_core.negatives.words import fold_name
from dcar_core.util.arrays import Mask, Pixels, Rows
from dcar_core.util.errors import DataError, DcarError, ImageError
from dcar_core.util.files import atomic_writer, hash_json, write_bytes
from dcar_core.util.machine import available_cores

MAX_NEGATIVES = 8  # of a pair, in training
IMAGE_BATCH = 64
TEXT_BATCH = 256


class FeatureCache:
    """Outputs of one frozen backbone below `directory`, in a sub-directory for each
    backbone; None stores nothing.
    """

    def __init__(self, directory: Path | None, backbone: Backbone) -> None:
        self.backbone_hash = backbone.content_hash()
        self._device = backbone.device
        self._directory = (
            directory / self.backbone_hash[:16] if directory is not None else None
        )
        self._image_hashes: dict[str, dict[str, str]] = {}

    def image_hashes(self, data: Dataset) -> dict[str, str]:
        """Return the hash of the bytes of each of a split's images, read once. Raise
        DataError if one is missing.
        """
        names = hash_json([str(data.root.path), data.images])
        if names not in self._image_hashes:
            self._image_hashes[names] = {
                name: hashlib.sha256(data.read(name)).hexdigest()
                for name in data.images
            }
        return self._image_hashes[names]

    def tensor(self, kind: str, key: str, compute: Callable[[], Tensor]) -> Tensor:
        """Load an entry to the backbone's device; compute and store it first if it is
        missing.
        """
        if self._directory is None:
            return compute()
        path = self._directory / f"{kind}-{key}.npy"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            stored = io.BytesIO()
            # into a file it would not notice a full disk
            np.save(stored, compute().cpu().numpy())
            write_bytes(path, stored.getbuffer(), shared=True)
        return torch.from_numpy(np.load(path)).to(self._device)

    def pixels(
        self,
        key: str,
        shape: tuple[int, ...],
        decode: Callable[[], Iterator[Pixels]],
    ) -> Pixels:
        """Load a uint8 array of `shape`, memory-mapped; store what `decode` yields, row
        by row, if it is missing.
        """
        if self._directory is None:
            out = np.empty(shape, np.uint8)
            for row, image in enumerate(decode()):
                out[row] = image
            return out
        path = self._directory / f"pixels-{key}.npy"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            with atomic_writer(path, shared=True) as file:
                np.lib.format.write_array_header_2_0(file, header)
                file.writelines(image.tobytes() for image in decode())
        pixels: Pixels = np.load(path, "r")
        return pixels


@dataclass(frozen=True)
class PreparedSplit:
    """A split of N pairs and I images.

    image_of: (N,), the row of each pair's image. tokens: int64 (N, n), cut so that the
    prompts fit. caption_group: int64 (N,), equal for captions that read the same.
    true_pairs: int64, sorted: caption_group * I + image, where the caption equals a
    caption or attribute of the image. pixels: uint8 (I, 3, S, S); None if frozen image
    features suffice. image_features, text_features: (I, E) and (N, E) of the frozen
    encoders, normalized; None if not needed. pair_weights: (N, n) blended factors from
    each caption's own image, or None. candidate_features: (N, 1 + M, E) of the frozen
    text encoder, the caption first, then its negatives; or None. candidate_weights: (N,
    1 + M) category-matching weights of the candidates, 0 for padding; or None.
    """

    image_of: Rows
    tokens: Tensor
    caption_group: NDArray[np.int64]
    true_pairs: NDArray[np.int64]
    pixels: Pixels | None
    image_features: Tensor | None
    text_features: Tensor | None
    pair_weights: Tensor | None
    candidate_features: Tensor | None
    candidate_weights: Tensor | None

    def __len__(self) -> int:
        return len(self.image_of)

    def positives(self, rows: Rows) -> Mask:
        """Return bool (B, B): true where the caption of pair i describes the image of
        pair j.
        """
        images = self.image_of.max() + 1
        codes = self.caption_group[rows][:, None] * images + self.image_of[rows][None]
        places = np.searchsorted(self.true_pairs, codes).clip(
            max=len(self.true_pairs) - 1
        )
        is_true: Mask = self.true_pairs[places] == codes
        return is_true

    def right_answers(self) -> tuple[list[Rows], list[Rows]]:
        """Return the images that each caption describes, and the captions that describe
        each image.
        """
        groups, images = np.divmod(self.true_pairs, self.image_of.max() + 1)
        ends = np.searchsorted(groups, np.arange(groups[-1] + 2))
        images_of = [
            images[ends[group] : ends[group + 1]] for group in self.caption_group
        ]
        texts_of: list[list[int]] = [[] for _ in range(images.max() + 1)]
        for text, described in enumerate(images_of):
            for image in described:
                texts_of[image].append(text)
        return images_of, [np.array(texts) for texts in texts_of]


def prepare_split(
    data: Dataset,
    model: DCAR,
    *,
    for_training: bool,
    cache: FeatureCache | None = None,
) -> PreparedSplit:
    """Decode the images, tokenise the captions, and run the frozen encoders once for
    what the method needs.

    Raises:
        DataError: an image is missing or broken; the message names it.
    """
    backbone = model.backbone
    config = model.config
    cache = cache or FeatureCache(None, backbone)
    frozen = FrozenFeatures(data, backbone, cache)
    captions = [sample.caption for sample in data.samples]
    groups: dict[str, int] = {}
    caption_group = np.array(
        [groups.setdefault(fold_text(caption), len(groups)) for caption in captions]
    )
    tokens = backbone.tokenize(captions, model.prompt_tokens)
    has_anchor = for_training and (
        config.loss.anchor > 0 or model.method.batch_loss is not None
    )
    has_pair_weights = for_training and config.reweight.train == "pair"
    has_candidates = for_training and model.category_adapter() is not None
    candidates: tuple[Any, Any] = (None, None)
    if has_candidates:
        candidates = frozen.candidates(config.loss.alpha)
    return PreparedSplit(
        frozen.image_of,
        tokens,
        caption_group,
        _true_pairs(data, groups, frozen.image_of),
        pixels=None if model.image_is_frozen else frozen.pixels,
        image_features=frozen.images() if model.image_is_frozen or has_anchor else None,
        text_features=(
            frozen.texts(captions) if model.text_is_frozen or has_anchor else None
        ),
        pair_weights=(
            frozen.pair_weights(tokens, config.reweight) if has_pair_weights else None
        ),
        candidate_features=candidates[0],
        candidate_weights=candidates[1],
    )


def split_key(data: Dataset, cache: FeatureCache) -> str:
    """Return a hash of images and texts, equal for splits that train the same. Raise
    DataError if one is missing.
    """
    return hash_json(
        [
            cache.image_hashes(data),
            [[*vars(sample).values()] for sample in data.samples],
        ]
    )


def report_truncation(
    splits: Mapping[str, Dataset],
    reports: Mapping[str, CleaningReport],
    backbone: Backbone,
    prompt_tokens: int,
) -> None:
    """Add to each report the number of captions that are cut because prompts take a
    part of the context.

    The report of the training split also counts the negatives beyond `MAX_NEGATIVES`.

    Raises:
        DcarError: the prompts leave no room for a single token.
    """
    if prompt_tokens + 3 > backbone.context_length:  # SOS, a token and EOT
        context = backbone.context_length
        raise DcarError(
            f"{prompt_tokens} prompts leave no room for words in a context of {context}"
            " tokens"
        )
    if "train" in splits:
        unused = sum(
            max(0, len(sample.negatives) - MAX_NEGATIVES)
            for sample in splits["train"].samples
        )
        reports["train"].add(
            f"negatives after the first {MAX_NEGATIVES} of a pair, not trained on",
            unused,
        )
    message = (
        f"captions cut to the {backbone.context_length - prompt_tokens} tokens that fit"
    )
    tokenizer = backbone.text_tokenizer(prompt_tokens)
    for name, data in splits.items():
        reports[name].add(
            message,
            sum(tokenizer.exceeds_limit(sample.caption) for sample in data.samples),
        )


def _true_pairs(
    data: Dataset,
    groups: Mapping[str, int],
    image_of: Rows,
) -> NDArray[np.int64]:
    images = int(image_of.max()) + 1
    pairs = {
        group * images + int(image)
        for sample, image in zip(data.samples, image_of, strict=True)
        for text in (sample.caption, *sample.attributes)
        if (group := groups.get(fold_text(text))) is not None
    }
    return np.array(sorted(pairs), np.int64)


class FrozenFeatures:
    """Frozen features of one split, read from `cache` or computed on request.

    Shapes: N pairs, I images, E the joint space.
    """

    def __init__(self, data: Dataset, backbone: Backbone, cache: FeatureCache) -> None:
        self.data = data
        self.backbone = backbone
        self.cache = cache
        self.names = data.images
        row_of = {name: row for row, name in enumerate(self.names)}
        self.image_of = np.array([row_of[sample.image] for sample in data.samples])
        # their order counts
        self.image_key = hash_json([*cache.image_hashes(data).items()])

    @cached_property
    def pixels(self) -> Pixels:
        """The decoded images, uint8 (I, 3, S, S)."""
        size = self.backbone.preprocess.size
        return self.cache.pixels(
            self.image_key,
            (len(self.names), 3, size, size),
            self._decode,
        )

    def images(self) -> Tensor:
        """Return image features (I, E), normalized, without prompts."""
        return self.cache.tensor(
            "images", self.image_key, lambda: self._encode_images(self.pixels)
        )

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Return text features (len(texts), E), normalized, without prompts; equal
        texts are encoded once.
        """
        unique = list(dict.fromkeys(texts))
        row_of = {text: row for row, text in enumerate(unique)}
        features = self.cache.tensor(
            "texts", hash_json(unique), lambda: self._encode_texts(unique)
        )
        return features[
            torch.tensor([row_of[text] for text in texts], device=features.device)
        ]

    def pair_weights(self, tokens: Tensor, config: ReweightConfig) -> Tensor:
        """Return token factors (N, n) of the captions, each from its own image."""
        texts = [s.caption for s in self.data.samples]
        features = config.token_feature, config.image_feature
        key = hash_json(
            [self.image_key, texts, self.image_of.tolist(), tokens.shape[1], *features]
        )
        raw = self.cache.tensor(
            "weights", key, lambda: self._raw_weights(tokens, config)
        )
        return blend(raw, self.backbone.layout.caption_mask(tokens), config)

    def candidates(self, alpha: float) -> tuple[Tensor, Tensor]:
        """Return features (N, 1 + M, E) of captions and negatives, and their
        category-matching weights (N, 1 + M).
        """
        samples = self.data.samples
        device = self.backbone.device
        width = min(MAX_NEGATIVES, max((len(s.negatives) for s in samples), default=0))
        places = [
            (i, j)
            for i, s in enumerate(samples)
            for j in range(min(width, len(s.negatives)))
        ]
        features = torch.zeros(
            len(samples),
            1 + width,
            self.backbone.embed_dim,
            device=device,
        )
        weights = torch.zeros(len(samples), 1 + width, device=device)
        features[:, 0] = self.texts([s.caption for s in samples])
        weights[:, 0] = 1
        if places:
            rows, columns = torch.tensor(places, device=device).T
            features[rows, 1 + columns] = self.texts(
                [samples[i].negatives[j] for i, j in places]
            )
            is_other = [_has_other_category(samples[i], j) for i, j in places]
            weights[rows, 1 + columns] = (
                1 + alpha * torch.tensor(is_other, device=device).float()
            )
        return features, weights

    def _decode(self) -> Iterator[Pixels]:
        def decode(name: str) -> Pixels:
            try:
                return self.backbone.preprocess(self.data.read(name))
            except ImageError as error:
                message = (
                    f"{self.data.split}: {name}: {error}; replace the image, or leave"
                    " it out with --skip-broken"
                )
                raise DataError(message) from error

        # Pillow releases the GIL while it decodes
        with ThreadPoolExecutor(min(8, available_cores())) as pool:
            images = pool.map(decode, self.names)
            yield from tqdm(
                images,
                f"reading {self.data.split} images",
                len(self.names),
                leave=False,
            )

    @torch.no_grad()
    def _encode_images(self, pixels: Pixels) -> Tensor:
        backbone = self.backbone
        parts = []
        for i in tqdm(
            range(0, len(pixels), IMAGE_BATCH),
            "frozen image features",
            leave=False,
        ):
            batch = backbone.standardized(pixels[i : i + IMAGE_BATCH])
            parts.append(F.normalize(backbone.encode_image(batch), dim=-1))
        return torch.cat(parts)

    @torch.no_grad()
    def _encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Encode in order of length, so that short texts need little padding."""
        tokens = self.backbone.tokenize(texts)
        lengths = self.backbone.layout.lengths(tokens)
        order = torch.argsort(lengths)
        out = torch.empty(len(texts), self.backbone.embed_dim, device=tokens.device)
        for i in tqdm(
            range(0, len(texts), TEXT_BATCH),
            "frozen text features",
            leave=False,
        ):
            rows = order[i : i + TEXT_BATCH]
            part = tokens[rows, : int(lengths[rows[-1]])]
            out[rows] = F.normalize(self.backbone.encode_text(part), dim=-1)
        return out

    @torch.no_grad()
    def _raw_weights(self, tokens: Tensor, config: ReweightConfig) -> Tensor:
        def encode(pixels: Pixels) -> Tensor:
            return image_features(
                self.backbone,
                self.backbone.standardized(pixels),
                config,
            )

        blank = encode(self.backbone.preprocess.blank()[None])[0]
        parts = []
        pooled = self.images() if config.image_feature == "pooled" else None
        size = TEXT_BATCH if pooled is not None else IMAGE_BATCH
        for i in tqdm(range(0, len(tokens), size), "token weights", leave=False):
            words = token_text_features(self.backbone, tokens[i : i + size], config)
            rows = self.image_of[i : i + size]
            # Patch features are computed per batch: an image has dozens of patches, too
            # many to keep.
            images = pooled[rows] if pooled is not None else encode(self.pixels[rows])
            parts.append(pair_weights(words, images, blank))
        return torch.cat(parts)


def _has_other_category(sample: Sample, negative: int) -> bool:
    category = sample.negative_categories[negative : negative + 1]
    return any(category) and fold_name(category[0]) != fold_name(sample.category)
