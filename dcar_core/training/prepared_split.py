"""A split prepared for the training loop: images, tokens and the frozen features that the method needs.

A tower without trained parts (both towers of CLIP-Adapter, CoOp's image tower) contributes frozen features only. Its
images are not even decoded once the features are in the cache.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dcar_core.data import CleaningReport, Dataset
from dcar_core.data.clean import fold_text
from dcar_core.model.backbone import Backbone
from dcar_core.model.dcar import DCAR
from dcar_core.training.feature_cache import FeatureCache, digest
from dcar_core.training.frozen_features import MAX_NEGATIVES, FrozenFeatures
from dcar_core.util.arrays import Mask, Pixels, Rows
from dcar_core.util.errors import TrainingError


@dataclass(frozen=True)
class PreparedSplit:
    """A split of N pairs and I images.

    key: hash of the images and texts.
    image_of: (N,), the row of each pair's image.
    tokens: int64 (N, n), with room for the prompts.
    caption_group: int64 (N,), equal for captions that read the same.
    true_pairs: int64, sorted: caption_group * I + image, where the caption equals a caption or attribute of the image.
    pixels: uint8 (I, 3, S, S); None if frozen image features suffice.
    image_features, text_features: (I, E) and (N, E) of the frozen encoders, normalized; None if not needed.
    pair_weights: (N, n) blended factors from each caption's own image, or None.
    candidate_features: (N, 1 + M, E) of the frozen text encoder, the caption first, then its negatives; or None.
    candidate_weights: (N, 1 + M) category-matching weights of the candidates, 0 for padding; or None.
    """

    key: str
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
        """Return bool (B, B): true where the caption of pair i describes the image of pair j."""
        images = self.image_of.max() + 1
        codes = self.caption_group[rows][:, None] * images + self.image_of[rows][None]
        places = np.searchsorted(self.true_pairs, codes).clip(max=len(self.true_pairs) - 1)
        is_true: Mask = self.true_pairs[places] == codes
        return is_true

    def right_answers(self) -> tuple[list[Rows], list[Rows]]:
        """Return the images that each caption describes, and the captions that describe each image."""
        groups, images = np.divmod(self.true_pairs, self.image_of.max() + 1)
        ends = np.searchsorted(groups, np.arange(groups[-1] + 2))
        images_of = [images[ends[group] : ends[group + 1]] for group in self.caption_group]
        texts_of: list[list[int]] = [[] for _ in range(images.max() + 1)]
        for text, described in enumerate(images_of):
            for image in described:
                texts_of[image].append(text)
        return images_of, [np.array(texts) for texts in texts_of]


def prepare_split(
    data: Dataset, model: DCAR, *, for_training: bool, progress: bool = True, cache: FeatureCache | None = None
) -> PreparedSplit:
    """Decode the images, tokenise the captions, and run the frozen encoders once for what the method needs.

    Raises:
        DataError: an image is missing or broken; the message names it.
    """
    backbone, config = model.backbone, model.config
    cache = cache or FeatureCache(None, backbone)
    frozen = FrozenFeatures(data, backbone, cache, progress)
    captions = [sample.caption for sample in data.samples]
    groups: dict[str, int] = {}
    caption_group = np.array([groups.setdefault(fold_text(caption), len(groups)) for caption in captions])
    tokens = backbone.tokenize(captions, model.prompt_tokens)
    has_anchor = for_training and (config.loss.anchor > 0 or model.method.batch_loss is not None)
    has_pair_weights = for_training and config.reweight.train == "pair"
    candidate_features = candidate_weights = None
    if for_training and model.category_adapter() is not None:
        candidate_features, candidate_weights = frozen.candidates(config.loss.alpha)
    return PreparedSplit(
        split_key(data, cache),
        frozen.image_of,
        tokens,
        caption_group,
        _true_pairs(data, groups, frozen.image_of),
        pixels=None if model.image_is_frozen else frozen.pixels(),
        image_features=frozen.images() if model.image_is_frozen or has_anchor else None,
        text_features=frozen.texts(captions) if model.text_is_frozen or has_anchor else None,
        pair_weights=frozen.pair_weights(tokens, config.reweight) if has_pair_weights else None,
        candidate_features=candidate_features,
        candidate_weights=candidate_weights,
    )


def split_key(data: Dataset, cache: FeatureCache) -> str:
    """Return a hash of images and texts, equal for splits that train the same. Raise DataError if one is missing."""
    texts = [[s.image, s.caption, s.category, s.negatives, s.negative_categories, s.attributes] for s in data.samples]
    return digest(cache.image_key(data), texts)


def report_truncation(
    splits: Mapping[str, Dataset], reports: Mapping[str, CleaningReport], backbone: Backbone, prompt_tokens: int
) -> None:
    """Add to each report the number of captions that are cut because prompts take a part of the context.

    The report of the training split also counts the negatives beyond `MAX_NEGATIVES`.

    Raises:
        TrainingError: the prompts leave no room for a single token.
    """
    if prompt_tokens + 3 > backbone.context_length:  # SOS, a token and EOT
        context = backbone.context_length
        raise TrainingError(f"{prompt_tokens} prompts leave no room for words in a context of {context} tokens")
    if "train" in splits:
        unused = sum(max(0, len(sample.negatives) - MAX_NEGATIVES) for sample in splits["train"].samples)
        reports["train"].add(f"negatives after the first {MAX_NEGATIVES} of a pair, not trained on", unused)
    message = f"captions cut to the {backbone.context_length - prompt_tokens} tokens that fit"
    tokenizer = backbone.text_tokenizer(prompt_tokens)
    for name, data in splits.items():
        reports[name].add(message, sum(tokenizer.exceeds_limit(sample.caption) for sample in data.samples))


def _true_pairs(data: Dataset, groups: Mapping[str, int], image_of: Rows) -> NDArray[np.int64]:
    images = int(image_of.max()) + 1
    pairs = {
        group * images + int(image)
        for sample, image in zip(data.samples, image_of, strict=True)
        for text in (sample.caption, *sample.attributes)
        if (group := groups.get(fold_text(text))) is not None
    }
    return np.array(sorted(pairs), np.int64)
