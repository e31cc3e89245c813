"""Features on the disk: hits, misses, damage and remains of killed runs."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dcar_core.data import Dataset
from dcar_core.model.backbone import Backbone, BackboneSource, load_backbone
from dcar_core.model.config import PromptConfig
from dcar_core.model.dcar import DCAR, seeded_model
from dcar_core.model.methods.registry import method
from dcar_core.training.feature_cache import FeatureCache
from dcar_core.training.prepared_split import prepare_split, split_key
from tests.support.training import move_weights


def test_feature_cache_returns_the_computed_features(backbone: Backbone, training: Dataset, tmp_path: Path) -> None:
    shorter = replace(method("dcar"), prompt=PromptConfig(length=2))
    for config in (shorter, *map(method, ("dcar", "clip-adapter", "dcar-alone", "dcar-patches"))):
        model, plain = move_weights(DCAR(backbone, config), training)
        for _ in range(2):  # the second time from the disk
            cached = prepare_split(
                training, model, for_training=True, progress=False, cache=FeatureCache(tmp_path, backbone)
            )
            for field, one in vars(plain).items():
                other = getattr(cached, field)
                assert (one is None) == (other is None)
                assert one is None or np.array_equal(one, other), field
    assert not list(tmp_path.rglob("*.tmp"))


def test_remains_of_killed_runs_are_deleted_after_a_day(backbone: Backbone, tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, backbone)
    cache.tensor("kind", "one", lambda: torch.zeros(2))
    (folder,) = tmp_path.iterdir()
    old, fresh = folder / ".pixels-x.npy.17.tmp", folder / ".pixels-y.npy.18.tmp"
    for part in (old, fresh):
        part.write_bytes(b"half")
    os.utime(old, (0, 0))
    cache.tensor("kind", "two", lambda: torch.ones(2))
    assert sorted(path.name for path in folder.iterdir()) == [fresh.name, "kind-one.npy", "kind-two.npy"]


def test_feature_cache_misses_for_other_images_texts_and_weights(
    backbone: Backbone, training: Dataset, tiny_gallery: Path, other_backbone: Backbone, tmp_path: Path
) -> None:
    def entries(backbone: Backbone, data: Dataset) -> int:
        model = seeded_model(backbone, method("clip-adapter"), 0)
        prepare_split(data, model, for_training=True, progress=False, cache=FeatureCache(tmp_path, backbone))
        return len([path for path in tmp_path.rglob("*") if path.is_file()])

    assert entries(backbone, training) == entries(backbone, training) == 3  # pixels, images, texts
    renamed = replace(training, samples=[replace(s, caption=s.caption + "!") for s in training.samples])
    assert entries(backbone, renamed) == 4
    first = tiny_gallery / training.samples[0].image
    content = first.read_bytes()
    try:
        first.write_bytes((tiny_gallery / training.samples[1].image).read_bytes())
        assert entries(backbone, training) == 6
    finally:
        first.write_bytes(content)
    assert entries(other_backbone, training) == 9


@pytest.fixture(scope="module")
def other_backbone(tiny_model: Path) -> Backbone:
    other = load_backbone(BackboneSource(str(tiny_model)))
    with torch.no_grad():
        other.visual.proj.mul_(1.001)
    return other


def test_digest_of_a_split_covers_all_training_data(backbone: Backbone, training: Dataset) -> None:
    cache, first = FeatureCache(None, backbone), training.samples[0]
    names = {"caption": "other", "category": "other"} | dict.fromkeys(
        ("negatives", "negative_categories", "attributes"), ("other",)
    )
    others = [replace(first, **{name: value}) for name, value in names.items()]  # type: ignore[arg-type]
    keys = [split_key(replace(training, samples=[one, *training.samples[1:]]), cache) for one in (first, *others)]
    assert len(set(keys)) == 6


def test_failed_computation_leaves_no_cache_entry(backbone: Backbone, tmp_path: Path) -> None:
    def fails() -> Tensor:
        raise RuntimeError("out of memory")

    cache = FeatureCache(tmp_path, backbone)
    with pytest.raises(RuntimeError, match="out of memory"):
        cache.tensor("images", "key", fails)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert torch.equal(cache.tensor("images", "key", lambda: torch.ones(2)), torch.ones(2))


def test_damaged_cache_entry_is_computed_again(backbone: Backbone, tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, backbone)

    def entries() -> tuple[Tensor, Any]:
        pixels = cache.array("pixels", "key", (40, 8), lambda out: out.fill(7))
        return cache.tensor("images", "key", lambda: torch.ones(50)), pixels

    entries()
    for length in (0, 20, 150):
        for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
            path.write_bytes(path.read_bytes()[:length])
        features, pixels = entries()
        assert torch.equal(features, torch.ones(50))
        assert (pixels == 7).all()
        assert pixels.shape == (40, 8)
