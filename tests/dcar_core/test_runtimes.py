"""Runtimes give the vectors of PyTorch; a faulty one is an error by name, and replaced
with `auto`.
"""

import importlib.util
import logging
import re
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dcar_core import Encoder
from dcar_core.encoder.exports import ensure_export
from dcar_core.encoder.graphs import extract_state
from dcar_core.encoder.runtimes import (
    LEAST_COSINE,
    PROBE_TEXTS,
    auto_exports,
    auto_runtimes,
    check_vectors,
    open_runtime,
    probe_images,
    reference_vectors,
)
from dcar_core.encoder.state import OpenVinoRuntime
from dcar_core.model.backbone import BackboneSource, load_backbone
from dcar_core.model.config import (
    AdapterConfig,
    ModelConfig,
    PromptConfig,
    ReweightConfig,
)
from dcar_core.model.dcar import DCAR
from dcar_core.util import machine
from dcar_core.util.errors import RuntimeUnavailableError
from tests.support.files import copy_exports
from tests.support.parts import needs


def named(*names: str) -> list[Any]:
    """Parameters of a test: names of runtimes, each skipped where it cannot run."""
    bf16 = pytest.mark.skipif(
        machine.missing_bf16() is not None, reason=str(machine.missing_bf16())
    )
    marks = {
        "openvino": [needs("openvino")],
        "openvino-bf16": [needs("openvino"), bf16],
    }
    return [pytest.param(name, marks=marks.get(name, [])) for name in names]


@pytest.fixture(scope="module")
def cache(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    if importlib.util.find_spec("openvino"):
        copy_exports(request.getfixturevalue("exports"), cache)
    return cache


class Case:
    """A model, its state, and its export."""

    def __init__(self, model: DCAR, cache: Path) -> None:
        backbone_hash = model.backbone.content_hash()
        self.model = model
        self.state = extract_state(model, "f" * 64, backbone_hash)
        self.export = partial(ensure_export, model, backbone_hash, cache)

    def open(self, name: str) -> Encoder:
        return Encoder(
            self.state,
            self.model,
            open_runtime(name, self.model, self.export),
        )


def moved(model_dir: Path, config: ModelConfig, cache: Path, seed: int = 3) -> Case:
    """A case whose every trainable differs from its start."""
    torch.manual_seed(seed)
    model = DCAR(load_backbone(BackboneSource(str(model_dir))), config).eval()
    with torch.no_grad():
        for _, parameter in model.trainables():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return Case(model, cache)


PLAIN = ModelConfig(prompt=PromptConfig(length=0))
ADAPTERS = AdapterConfig(text=True, image=True, blocks=6)
BLOCKS = ModelConfig(prompt=PromptConfig(length=0), adapter=ADAPTERS)
PREDICTED = ReweightConfig(query="predicted")
DEEP = ModelConfig(
    prompt=PromptConfig(length=3, depth=2),
    adapter=ADAPTERS,
    reweight=PREDICTED,
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [PLAIN, ModelConfig(), BLOCKS, DEEP],
    ids=["plain", "dcar", "blocks", "deep"],
)
@pytest.mark.parametrize("name", named("torch", "openvino", "openvino-bf16"))
def test_runtime_gives_the_models_vectors(
    exported_model: Path,
    cache: Path,
    name: str,
    config: ModelConfig,
) -> None:
    case = moved(exported_model, config, cache)
    encoder = case.open(name)
    found = encoder.encode_text(PROBE_TEXTS), encoder.encode_pixels(probe_images(32))
    for vectors, expected in zip(found, reference_vectors(case.model), strict=True):
        assert (vectors * expected).sum(1).min() > (
            0.999 if name == "openvino-bf16" else 0.99999
        )


@pytest.mark.parametrize("name", named("torch", "openvino"))
def test_rows_of_several_adapters_share_a_batch(
    exported_model: Path,
    cache: Path,
    name: str,
) -> None:
    first, second = (moved(exported_model, DEEP, cache, seed) for seed in (1, 2))
    one = first.state
    other = second.state
    runtime = first.open(name).runtime
    tokens = one.tokens(["a red square", "a green circle", "a red square"])[
        :, one.skipped :
    ]
    weights = np.ones(tokens.shape, np.float32)
    parts = zip(one.text_inputs, other.text_inputs, other.text_inputs, strict=True)
    mixed = runtime.text(
        tokens,
        weights,
        tuple(np.concatenate(part, 1) for part in parts),
    )
    np.testing.assert_allclose(
        mixed[:1],
        runtime.text(tokens[:1], weights[:1], one.text_inputs),
        atol=1e-5,
    )
    np.testing.assert_allclose(
        mixed[1:],
        runtime.text(tokens[1:], weights[1:], other.text_inputs),
        atol=1e-5,
    )
    assert np.abs(mixed[0] - mixed[2]).max() > 0.01
    assert [each.shape[2] for each in one.image_inputs] == [
        3,
        6,
        6,
    ], "prompts and the adapters' matrices"
    pixels = probe_images(32)[:2]
    pairs = zip(one.image_inputs, other.image_inputs, strict=True)
    both = runtime.image(pixels, tuple(np.concatenate(pair, 1) for pair in pairs))
    np.testing.assert_allclose(
        both[:1],
        runtime.image(pixels[:1], one.image_inputs),
        atol=1e-5,
    )
    np.testing.assert_allclose(
        both[1:],
        runtime.image(pixels[1:], other.image_inputs),
        atol=1e-5,
    )
    assert (
        np.abs(both[0] - runtime.image(pixels[:1], other.image_inputs)[0]).max() > 0.01
    )


@needs("openvino")
def test_one_export_serves_every_number_of_prompts(
    exported_model: Path, cache: Path
) -> None:
    first = moved(exported_model, ModelConfig(), cache)
    longer = moved(exported_model, ModelConfig(prompt=PromptConfig(length=6)), cache)
    lengths = [case.state.text_inputs[0].shape[3] for case in (first, longer)]
    assert lengths == [5, 7], "SOS and the prompts"
    assert first.export() == longer.export()
    check_vectors(
        longer.state,
        first.open("openvino").runtime,
        reference_vectors(longer.model),
    )


@pytest.mark.parametrize(
    ("device", "installed", "instructions", "names"),
    [
        (
            "cpu",
            True,
            "flags : sse2 avx512_bf16",
            ["openvino-bf16", "openvino", "torch"],
        ),
        (
            "cpu",
            True,
            "Features : fp asimd bf16",
            ["openvino-bf16", "openvino", "torch"],
        ),
        ("cpu", True, "flags : sse2 avx2", ["openvino", "torch"]),
        ("cpu", False, "flags : sse2 avx512_bf16", ["torch"]),
        ("cuda", True, "flags : sse2 avx512_bf16", ["cuda", "torch"]),
    ],
)
def test_auto_decides_by_device_libraries_and_instructions(
    device: str,
    installed: bool,
    instructions: str,
    names: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(machine, "is_installed", lambda library: installed)
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text(f"processor : 0\n{instructions}\n")
    assert auto_runtimes(device) == names


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["torch", "cuda"])
def test_gpu_gives_the_same_vectors(
    exported_checkpoint: Path,
    tmp_path: Path,
    name: str,
) -> None:
    wanted = Encoder.load(exported_checkpoint, device="cpu")
    given = Encoder.load(
        exported_checkpoint,
        device="cuda",
        runtime=name,
        cache=tmp_path,
    )
    texts = [" ".join("abcdefghij"[: 1 + i % 10]) for i in range(40)]
    pixels = np.tile(probe_images(32), (10, 1, 1, 1))

    def both(encoder: Encoder) -> NDArray[np.float32]:
        parts = [encoder.encode_pixels(pixels[:n]) for n in (1, 7, 40)]
        return np.concatenate(
            [
                encoder.encode_text(texts),
                encoder.encode_text(texts[:1]),
                *parts,
            ]
        )

    # as the service and the index job do, not in the thread that loaded it
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(both, [given, given]))
    for vectors in found:
        assert (vectors * both(wanted)).sum(1).min() > 0.999


@pytest.mark.parametrize(
    "side",
    [0, 1],
    ids=["text", "image"],
)
def test_a_single_vector_below_the_threshold_is_enough(
    exported_model: Path,
    tmp_path: Path,
    side: int,
) -> None:
    case = moved(exported_model, PLAIN, tmp_path)
    for cosine, is_refused in (
        (LEAST_COSINE + 0.0002, False),
        (LEAST_COSINE - 0.0002, True),
        (np.nan, True),
    ):
        expected = reference_vectors(case.model)
        expected[side][-1] *= cosine
        with (
            pytest.raises(RuntimeUnavailableError, match=r"cosine .* at least")
            if is_refused
            else nullcontext()
        ):
            check_vectors(case.state, case.open("torch").runtime, expected)


NAMES = auto_exports()
NAME = NAMES[0] if NAMES else "openvino"


@pytest.fixture
def chosen(exports: Path, tmp_path: Path) -> Path:
    """A cache with an export that a test may break. Each load has a backbone of its
    own, as at a start.
    """
    copy_exports(exports, tmp_path / "cache")
    return tmp_path / "cache"


def auto(
    checkpoint: Path,
    cache: Path,
    caplog: pytest.LogCaptureFixture,
) -> tuple[str, list[str]]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "dcar_core"):
        encoder = Encoder.load(checkpoint, device="cpu", runtime="auto", cache=cache)
    assert encoder.encode_text(["a red square"]).shape == (1, 32)
    return encoder.runtime.name, [record.getMessage() for record in caplog.records]


def by_name(checkpoint: Path, cache: Path, name: str = NAME) -> Encoder:
    return Encoder.load(checkpoint, device="cpu", runtime=name, cache=cache)


def export(cache: Path) -> Path:
    (found,) = (path.parent for path in (cache / "exports").glob("*/manifest.json"))
    return found


@pytest.mark.slow
def test_a_runtime_that_cannot_be_used_says_why(
    exported_checkpoint: Path,
    chosen: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(
        RuntimeUnavailableError,
        match=r"no runtime is named 'tensorrt'; there are: auto, torch",
    ):
        by_name(exported_checkpoint, chosen, "tensorrt")
    with pytest.raises(
        RuntimeUnavailableError, match="cuda needs --device cuda, but the device is cpu"
    ):
        by_name(exported_checkpoint, chosen, "cuda")
    (tmp_path / "cpuinfo").write_text("flags : sse2 avx2\n")
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    with pytest.raises(
        RuntimeUnavailableError, match=r"no bf16 instructions \(.*avx512_bf16"
    ):
        by_name(exported_checkpoint, chosen, "openvino-bf16")
    assert auto(exported_checkpoint, chosen, caplog) == ("openvino", [])
    # what importing it does when it is not installed
    monkeypatch.setitem(sys.modules, "openvino", None)
    warning = "OpenVINO is not installed, so PyTorch encodes, which is slower"
    assert auto(exported_checkpoint, chosen, caplog) == ("torch", [warning])
    with pytest.raises(RuntimeUnavailableError, match="OpenVINO is not installed"):
        by_name(exported_checkpoint, chosen, "openvino")


def refuse_to_convert(*_: object, **__: object) -> None:
    raise ValueError("aten::something is not supported\nand a long story")


def block(cache: Path) -> None:
    shutil.rmtree(cache)
    cache.touch()


def flip(cache: Path) -> None:
    values = bytearray((export(cache) / "text.bin").read_bytes())
    values[1000] ^= 1
    (export(cache) / "text.bin").write_bytes(values)


TEXT = OpenVinoRuntime.text


def reverse(*given: Any) -> Any:
    return TEXT(*given)[:, ::-1].copy()


def fail(*_: Any) -> Any:
    # as a library pleases
    raise RuntimeError("Failed to find C compiler.\nand a long story")


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (flip, "is corrupted.* delete it for a new one"),
        (
            lambda cache: (export(cache) / "text.bin").unlink(),
            "is incomplete.* delete it for a new one",
        ),
        (
            lambda cache: shutil.rmtree(cache / "exports"),
            "cannot be exported for openvino: aten::something is not",
        ),
        (block, "cannot be used: .* name another directory"),
        (reverse, "cannot be used: its vectors are not float32's here: cosine"),
        (fail, r"cannot be used: RuntimeError: Failed to find C compiler\."),
    ],
)
def test_runtime_that_cannot_be_used_is_refused_or_replaced_by_the_next(
    exported_checkpoint: Path,
    chosen: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[..., object],
    says: str,
) -> None:
    import openvino

    monkeypatch.setattr(openvino, "convert_model", refuse_to_convert)
    if fault in (reverse, fail):
        monkeypatch.setattr(OpenVinoRuntime, "text", fault)
    else:
        fault(chosen)
    name, warnings = auto(exported_checkpoint, chosen, caplog)
    assert name == "torch"
    for following, warning in zip([*NAMES[1:], "torch"], warnings, strict=True):
        assert re.search(
            rf"{says.partition('.*')[0]}.*; using the runtime {following} instead",
            warning,
        )
    with pytest.raises(RuntimeUnavailableError, match=says):
        by_name(exported_checkpoint, chosen)


def test_remains_of_a_killed_export_are_replaced(
    exported_checkpoint: Path, chosen: Path
) -> None:
    whole = export(chosen)
    left = whole.rename(whole.with_name(f"{whole.name}.part"))
    by_name(exported_checkpoint, chosen)
    assert export(chosen) == whole
    assert not left.exists()
