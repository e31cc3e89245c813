"""The fast mode against the exact one, with the bundled model, which is trained and so sees what people see."""

import io
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image

from dcar_core import Encoder
from dcar_core.images import ImageRoot, index_tar, open_image
from dcar_core.model import preprocess
from tests.support.images import encoded, peak_memory

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "emoji" / "twemoji"


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder.load(EXAMPLE / "checkpoint", device="cpu")


def jpegs(width: int, height: int, count: int) -> list[bytes]:
    """Return JPEG files with detail at every scale."""
    gallery = EXAMPLE / "gallery.tar"
    root, names = ImageRoot(gallery), sorted(index_tar(gallery))[:: 3 * count]
    tiles = [open_image(root.read(name)).resize((70, 70)) for name in names if name.endswith(".png")][: 6 * count]
    files = []
    for start in range(count):
        page, own = Image.new("RGB", (width, height), "white"), tiles[start::count]
        for i in range(-(-width // 70) * -(-height // 70)):
            page.paste(own[i % len(own)], (i % -(-width // 70) * 70, i // -(-width // 70) * 70))
        buffer = io.BytesIO()
        page.save(buffer, "JPEG", quality=92)
        files.append(buffer.getvalue())
    return files


@pytest.mark.parametrize(("width", "height"), [(150, 120), (241, 260), (500, 400), (1400, 960)])
@pytest.mark.slow
def test_fast_mode_changes_embeddings_little(encoder: Encoder, width: int, height: int) -> None:
    exact, fast = encoder.model.backbone.preprocess, encoder.preprocess
    assert exact.exact
    assert not fast.exact
    files = jpegs(width, height, 8)
    before = encoder.encode_pixels(np.stack([exact(file) for file in files]))
    after = encoder.encode_pixels(np.stack([fast(file) for file in files]))
    assert (before * after).sum(1).min() > 0.995


def test_jpeg_is_decoded_at_the_smallest_sufficient_size() -> None:
    file = jpegs(1400, 960, 1)[0]
    assert open_image(file).size == (1400, 960)
    assert open_image(file, at_least=121).size == (350, 240)  # an eighth would be 175 x 120
    assert open_image(file, at_least=120).size == (175, 120)
    assert open_image(file, at_least=961).size == (1400, 960)
    assert open_image(Image.new("RGB", (900, 900)), at_least=10).size == (900, 900)


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
def test_small_images_are_the_same_in_both_modes(encoder: Encoder, mode: Any) -> None:
    exact = type(encoder.preprocess)(48, (0.5,) * 3, (0.5,) * 3, "bicubic", mode)
    rng = np.random.default_rng(0)
    for width, height in ((110, 70), (97, 131), (48, 48), (30, 20)):
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        assert np.abs(exact(picture).astype(int) - exact.fast()(picture)).mean() < 0.5  # of 255


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pytorch_resizes_as_pillow_does(mode: Literal["shortest", "squash", "longest"], interpolation: str) -> None:
    exact = preprocess.Preprocess(48, (0.5,) * 3, (0.5,) * 3, interpolation, mode)  # type: ignore[arg-type]
    fast = exact.fast(torch=True)
    if torch.backends.cpu.get_cpu_capability() in {"AVX2", "AVX512"}:
        assert fast.resizer == "torch"
    rng = np.random.default_rng(0)
    for width, height in ((110, 70), (97, 131), (48, 48), (30, 20), (251, 250), (1, 1)):
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        before, after = exact(picture).astype(int), fast(picture)
        assert after.shape == before.shape
        assert after.flags.c_contiguous
        assert np.abs(before - after).max() <= 2
        assert np.abs(before - after).mean() < 0.05


def test_very_large_and_very_long_images_are_resized_by_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = preprocess.Preprocess(48, (0.5,) * 3, (0.5,) * 3).fast(torch=True)
    pillow = replace(fast, resizer="pillow")
    large, line = Image.linear_gradient("L").resize((400, 300)), Image.linear_gradient("L").resize((3, 90_000))
    asked = []
    monkeypatch.setattr(preprocess, "resize_by_torch", lambda *_: asked.append(_))
    for picture in (large, line):  # reduced by Pillow first; cut while it is scaled
        assert np.array_equal(fast(picture), pillow(picture))
    assert not asked


def test_processor_without_fast_instructions_resizes_by_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    preprocess.torch_is_fast.cache_clear()
    try:
        assert preprocess.Preprocess(48, (0.5,) * 3, (0.5,) * 3).fast(torch=True).resizer == "pillow"
    finally:
        preprocess.torch_is_fast.cache_clear()


def test_a_models_own_settings_are_followed() -> None:
    own = {"size": (48, 48), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    usual = preprocess.Preprocess.from_open_clip(own)
    assert (usual.interpolation, usual.resize, usual.fill) == ("bicubic", "shortest", 0)
    padded = preprocess.Preprocess.from_open_clip(
        {**own, "interpolation": "bilinear", "resize_mode": "longest", "fill_color": 127}
    )
    assert (padded.interpolation, padded.resize, padded.fill) == ("bilinear", "longest", 127)
    for how in (padded, padded.fast(torch=True)):
        pixels = how(Image.new("RGB", (96, 32), "white"))
        assert (pixels[:, :16] == 127).all()
        assert (pixels[:, 16:32] == 255).all()
        assert how(Image.new("RGB", (4000, 8), "white")).shape == (3, 48, 48), "a line keeps a pixel"


def test_fast_mode_keeps_the_hash_of_the_exact_mode(encoder: Encoder) -> None:
    exact = encoder.model.backbone.preprocess
    assert "exact" not in exact.to_dict()
    assert exact.fast().to_dict()["exact"] is False
    assert "resizer" not in exact.fast().to_dict()
    assert replace(exact.fast(), resizer="torch").to_dict()["resizer"] == "torch"


def test_long_image_is_cropped_while_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = preprocess.Preprocess(48, (0.5,) * 3, (0.5,) * 3)
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(90, 160, size, dtype=np.uint8)) for size in ((3, 500, 3), (700, 20, 3))]
    before = [exact(picture).astype(int) for picture in pictures]
    monkeypatch.setattr(preprocess, "MAX_SCALED_PIXELS", 48 * 48)
    after = [exact(picture) for picture in pictures]
    assert max(np.abs(one - other).max() for one, other in zip(before, after, strict=True)) <= 1


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux tells it")
@pytest.mark.slow
def test_image_of_one_line_takes_little_memory(tmp_path: Path) -> None:
    assert peak_memory(encoded(Image.new("RGB", (1, 10_000))), "exact", tmp_path) < 50 * 2**20
