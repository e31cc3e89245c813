"""What the frozen encoders say of a data set, computed once: nothing of it changes during training.

A tower in which nothing is learned (both of CLIP-Adapter's, CoOp's image tower) takes part in training as these
features alone; then its pictures are not even decoded once the features are in the cache.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from dcar_core.data import CleaningReport, Dataset, Sample
from dcar_core.data.clean import normalise
from dcar_core.model.backbone import Backbone
from dcar_core.model.config import ReweightConfig
from dcar_core.model.dcar import DCAR
from dcar_core.model.token_weights import blend, image_features, pair_weights, real_tokens, token_text_features
from dcar_core.negatives.words import fold_name
from dcar_core.training.feature_cache import FeatureCache, digest
from dcar_core.util.arrays import Pixels
from dcar_core.util.cpu_features import available_cores
from dcar_core.util.errors import DataError, ImageError, TrainingError

MAX_NEGATIVES = 8  # of a pair, in training
IMAGE_BATCH, TEXT_BATCH = 64, 256


@dataclass(frozen=True)
class Prepared:
    """A split ready for the loop; N pairs, I images.

    key: stands for the pictures and texts. image_of: int64 (N,), the row of each pair's image.
    tokens: int64 (N, n), with room for the prompts. caption_group: int64 (N,), equal where captions read the same.
    true_of: int64, sorted: caption_group * I + image where a caption is true of an image, by that image's own captions
        and attributes.
    pixels: uint8 (I, 3, S, S); None where frozen image features do.
    images, captions: (I, E) and (N, E) of the frozen encoders, normalised; None where nothing needs them.
    pair_weights: (N, n) blended factors from each caption's own image, or None.
    caption_features: (N, 1 + M, E) of the frozen text encoder, positive first, or None.
    matching: (N, 1 + M) category-matching weights, 0 for padding, or None.
    """

    key: str
    image_of: NDArray[np.int64]
    tokens: Tensor
    caption_group: NDArray[np.int64]
    true_of: NDArray[np.int64]
    pixels: Pixels | None = None
    images: Tensor | None = None
    captions: Tensor | None = None
    pair_weights: Tensor | None = None
    caption_features: Tensor | None = None
    matching: Tensor | None = None

    def __len__(self) -> int:
        return len(self.image_of)

    def positives(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """bool (B, B): whether the caption of the one pair is true of the image of the other."""
        images = self.image_of.max() + 1
        asked = self.caption_group[rows][:, None] * images + self.image_of[rows][None]
        places = np.searchsorted(self.true_of, asked).clip(max=len(self.true_of) - 1)
        found: NDArray[np.bool_] = self.true_of[places] == asked
        return found


def prepare(
    data: Dataset, model: DCAR, *, for_training: bool, progress: bool = True, cache: FeatureCache | None = None
) -> Prepared:
    """Decode the pictures, tokenise the captions, and run the frozen encoders once for what the method needs.

    Raises:
        DataError: a picture is missing or broken; the message names it.
    """
    backbone, config = model.backbone, model.config
    work = _Work(data, backbone, cache or FeatureCache(None, backbone), progress)
    captions = [sample.caption for sample in data.samples]
    groups: dict[str, int] = {}
    group = np.array([groups.setdefault(normalise(caption), len(groups)) for caption in captions])
    tokens = backbone.tokenize(captions, model.prompt_tokens)
    anchored = for_training and config.loss.anchor > 0
    weighted = for_training and (config.reweight.train == "pair" or model.head is not None)
    features = matching = None
    if for_training and model.category_adapter() is not None:
        features, matching = work.negatives(config.loss.alpha)
    return Prepared(
        data_key(data, work.cache),
        work.image_of,
        tokens,
        group,
        _true_of(data, groups, work.image_of),
        pixels=None if model.image_is_frozen else work.pixels(),
        images=work.images() if model.image_is_frozen or anchored else None,
        captions=work.texts(captions) if model.text_is_frozen or anchored else None,
        pair_weights=work.pair_weights(tokens, config.reweight) if weighted else None,
        caption_features=features,
        matching=matching,
    )


def decode(data: Dataset, backbone: Backbone, cache: FeatureCache, *, progress: bool = True) -> None:
    """Put a split's pictures into the cache, so that one that is broken is known now.

    Raises:
        DataError: a picture is missing or broken; the message names it.
    """
    _Work(data, backbone, cache, progress).pixels()


def _parts(rows: NDArray[np.int64], most: int) -> list[NDArray[np.int64]]:
    return [rows[i : i + most] for i in range(0, len(rows), most)]


def _true_of(data: Dataset, groups: Mapping[str, int], image_of: NDArray[np.int64]) -> NDArray[np.int64]:
    images = int(image_of.max()) + 1
    found = {
        group * images + int(image)
        for sample, image in zip(data.samples, image_of, strict=True)
        for text in (sample.caption, *sample.attributes)
        if (group := groups.get(normalise(text))) is not None
    }
    return np.array(sorted(found), np.int64)


def data_key(data: Dataset, cache: FeatureCache) -> str:
    """Stands for the pictures and texts of a split: equal where training would learn the same.

    Raises:
        DataError: a picture is missing; the message names it.
    """
    texts = [[s.image, s.caption, s.category, s.negatives, s.negative_categories, s.attributes] for s in data.samples]
    return digest(cache.pictures(data), texts)


def note_what_is_cut(
    splits: Mapping[str, Dataset], reports: Mapping[str, CleaningReport], backbone: Backbone, room: int
) -> None:
    """Count in each report the captions that do not fit when prompts take `room` tokens of the context, and in that of
    training the negatives that it leaves out.

    Raises:
        TrainingError: not even one token fits.
    """
    if room + 3 > backbone.context_length:  # SOS, a token and EOT
        raise TrainingError(f"{room} prompts leave no room for words in a context of {backbone.context_length} tokens")
    if "train" in splits:
        left = sum(max(0, len(sample.negatives) - MAX_NEGATIVES) for sample in splits["train"].samples)
        reports["train"].add(f"negatives after the first {MAX_NEGATIVES} of a pair, not trained on", left)
    what = f"captions longer than the {backbone.context_length - room} tokens that there is room for, cut"
    for name, data in splits.items():
        captions = [sample.caption for sample in data.samples]
        for start in range(0, len(captions), 1024):
            reports[name].add(what, sum(backbone.exceeds_context(captions[start : start + 1024], room)))


def _of_its_category(sample: Sample, negative: int) -> bool:
    given = sample.negative_categories[negative : negative + 1]
    return any(given) and fold_name(given[0]) == fold_name(sample.category)


class _Work:
    """The parts of a prepared split, each made when asked for."""

    def __init__(self, data: Dataset, backbone: Backbone, cache: FeatureCache, progress: bool) -> None:
        self.data, self.backbone, self.cache, self.progress = data, backbone, cache, progress
        self.names = data.images
        row_of = {name: row for row, name in enumerate(self.names)}
        self.image_of = np.array([row_of[sample.image] for sample in data.samples])
        self.key = cache.pictures(data)
        self._pixels: Pixels | None = None

    def pixels(self) -> Pixels:
        if self._pixels is None:
            size = self.backbone.preprocess.size
            self._pixels = self.cache.array("pixels", self.key, (len(self.names), 3, size, size), self._decode)
        return self._pixels

    def _decode(self, out: Pixels) -> None:
        def decode(row: int) -> None:
            name = self.names[row]
            try:
                out[row] = self.backbone.preprocess(self.data.read(name))
            except ImageError as error:
                raise DataError(f"{self.data.split}: {name}: {error}") from error

        with ThreadPoolExecutor(min(8, available_cores())) as pool:  # PIL decodes without the interpreter's lock
            rows = range(len(self.names))
            for _ in self._bar(pool.map(decode, rows), f"reading {self.data.split} pictures", len(rows)):
                pass

    def images(self) -> Tensor:
        """(I, E), normalised, without prompts."""
        return self.cache.tensor("images", self.key, lambda: self._encode_images(self.pixels()))

    @torch.no_grad()
    def _encode_images(self, pixels: Pixels) -> Tensor:
        backbone, parts = self.backbone, []
        for i in self._bar(range(0, len(pixels), IMAGE_BATCH), "frozen pictures"):
            batch = torch.from_numpy(backbone.preprocess.normalize(pixels[i : i + IMAGE_BATCH]))
            parts.append(F.normalize(backbone.encode_image(batch.to(backbone.device)), dim=-1))
        return torch.cat(parts)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """(len(texts), E), normalised, without prompts; each different text is encoded once."""
        unique = list(dict.fromkeys(texts))
        row_of = {text: row for row, text in enumerate(unique)}
        features = self.cache.tensor("texts", digest(unique), lambda: self._encode_texts(unique))
        return features[torch.tensor([row_of[text] for text in texts], device=features.device)]

    @torch.no_grad()
    def _encode_texts(self, texts: Sequence[str]) -> Tensor:
        """By length, so that a short text is not padded to a long one's size."""
        tokens = self.backbone.tokenize(texts)
        ends = tokens.argmax(-1)
        order = torch.argsort(ends)
        out = torch.empty(len(texts), self.backbone.embed_dim, device=tokens.device)
        for i in self._bar(range(0, len(texts), TEXT_BATCH), "frozen texts"):
            rows = order[i : i + TEXT_BATCH]
            part = tokens[rows, : int(ends[rows[-1]]) + 1]
            out[rows] = F.normalize(self.backbone.encode_text(part), dim=-1)
        return out

    def pair_weights(self, tokens: Tensor, config: ReweightConfig) -> Tensor:
        """(N, n) factors of the captions' tokens from their own images."""
        texts = [s.caption for s in self.data.samples]
        key = digest(self.key, texts, self.image_of.tolist(), tokens.shape[1], config.word, config.picture)
        raw = self.cache.tensor("weights", key, lambda: self._raw_weights(tokens, config))
        return blend(raw, real_tokens(tokens), config)

    @torch.no_grad()
    def _raw_weights(self, tokens: Tensor, config: ReweightConfig) -> Tensor:
        blank, parts = self._frozen(self.backbone.preprocess.blank()[None], config)[0], []
        pooled = self.images() if config.picture == "pooled" else None
        for i in self._bar(range(0, len(tokens), TEXT_BATCH), "token weights"):
            words = token_text_features(self.backbone, tokens[i : i + TEXT_BATCH], config)
            rows = self.image_of[i : i + TEXT_BATCH]
            if pooled is not None:
                images = pooled[rows]
            else:  # too many to keep: a picture has dozens of patches
                images = torch.cat([self._frozen(self.pixels()[part], config) for part in _parts(rows, IMAGE_BATCH)])
            parts.append(pair_weights(words, images, blank))
        return torch.cat(parts)

    def _frozen(self, pixels: Pixels, config: ReweightConfig) -> Tensor:
        batch = torch.from_numpy(self.backbone.preprocess.normalize(pixels)).to(self.backbone.device)
        return image_features(self.backbone, batch, config)

    def negatives(self, alpha: float) -> tuple[Tensor, Tensor]:
        """Frozen features (N, 1 + M, E) of positives and negatives, and their category-matching weights (N, 1 + M)."""
        samples, device = self.data.samples, self.backbone.device
        most = min(MAX_NEGATIVES, max((len(s.negatives) for s in samples), default=0))
        where = [(i, j) for i, s in enumerate(samples) for j in range(min(most, len(s.negatives)))]
        features = torch.zeros(len(samples), 1 + most, self.backbone.embed_dim, device=device)
        matching = torch.zeros(len(samples), 1 + most, device=device)
        features[:, 0], matching[:, 0] = self.texts([s.caption for s in samples]), 1 + alpha
        if where:
            rows, columns = torch.tensor(where, device=device).T
            features[rows, 1 + columns] = self.texts([samples[i].negatives[j] for i, j in where])
            same = [_of_its_category(samples[i], j) for i, j in where]
            matching[rows, 1 + columns] = 1 + alpha * torch.tensor(same, device=device).float()
        return features, matching

    def _bar(self, items: Any, what: str, total: int | None = None) -> Any:
        return tqdm(items, what, total, disable=not self.progress, leave=False)
