"""Runtimes give the vectors of PyTorch; a faulty one is an error by name, and replaced with `auto`."""

import importlib.util
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController, threadpool_limits

from dcar_core import Encoder
from dcar_core.encoder.graphs import TorchRuntime, extract_state
from dcar_core.encoder.openvino_runtime import OpenVinoRuntime, ensure_export
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
from dcar_core.encoder.state import FeatureAdapterArrays, group_by_length
from dcar_core.model.backbone import BackboneSource, load_backbone
from dcar_core.model.config import AdapterConfig, ModelConfig, PromptConfig
from dcar_core.model.dcar import DCAR
from dcar_core.util import machine
from dcar_core.util.errors import MissingExtraError, RuntimeUnavailableError
from dcar_core.util.files import default_cache_directory
from tests.support.commands import run
from tests.support.files import copy_exports
from tests.support.parts import needs


def named(*names: str) -> list[Any]:
    """Parameters of a test: names of runtimes, each skipped where it cannot run."""
    bf16 = pytest.mark.skipif(machine.missing_bf16() is not None, reason=str(machine.missing_bf16()))
    marks = {"openvino": [needs("openvino")], "openvino-bf16": [needs("openvino"), bf16]}
    return [pytest.param(name, marks=marks.get(name, [])) for name in names]


@pytest.fixture(scope="module")
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    if importlib.util.find_spec("openvino"):
        copy_exports(request.getfixturevalue("exports"), cache)
    return cache


class Case:
    """A model, its state, and its export."""

    def __init__(self, model: DCAR, cache: Path) -> None:
        backbone_hash = model.backbone.content_hash()
        self.model, self.state = model, extract_state(model, "f" * 64, backbone_hash)
        self.export = partial(ensure_export, model, backbone_hash, cache)

    def open(self, name: str) -> Encoder:
        return Encoder(self.state, self.model, open_runtime(name, self.model, self.export))


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
DEEP = ModelConfig(prompt=PromptConfig(length=3, depth=2), adapter=ADAPTERS).with_query_weights("predicted")


@pytest.mark.slow
@pytest.mark.parametrize("config", [PLAIN, ModelConfig(), BLOCKS, DEEP], ids=["plain", "dcar", "blocks", "deep"])
@pytest.mark.parametrize("name", named("torch", "openvino", "openvino-bf16"))
def test_runtime_gives_the_models_vectors(tiny_model: Path, cache: Path, name: str, config: ModelConfig) -> None:
    case = moved(tiny_model, config, cache)
    encoder = case.open(name)
    found = encoder.encode_text(PROBE_TEXTS), encoder.encode_pixels(probe_images(32))
    for vectors, expected in zip(found, reference_vectors(case.model), strict=True):
        assert (vectors * expected).sum(1).min() > (0.999 if name == "openvino-bf16" else 0.99999)


@pytest.mark.parametrize("name", named("torch", "openvino"))
def test_rows_of_several_adapters_share_a_batch(tiny_model: Path, cache: Path, name: str) -> None:
    first, second = (moved(tiny_model, DEEP, cache, seed) for seed in (1, 2))
    one, other, runtime = first.state, second.state, first.open(name).runtime
    tokens = one.tokens(["a red square", "a green circle", "a red square"])[:, one.text_prompts.skipped :]
    weights = np.ones(tokens.shape, np.float32)
    prompts = [one.text_prompts, other.text_prompts, other.text_prompts]
    parts = zip(*(each.inputs for each in prompts), strict=True)
    joined = tuple(np.concatenate(part, 1) for part in parts)
    mixed = runtime.text(tokens, weights, replace(prompts[0], inputs=joined))
    np.testing.assert_allclose(mixed[:1], runtime.text(tokens[:1], weights[:1], one.text_prompts), atol=1e-5)
    np.testing.assert_allclose(mixed[1:], runtime.text(tokens[1:], weights[1:], other.text_prompts), atol=1e-5)
    assert np.abs(mixed[0] - mixed[2]).max() > 0.01
    assert [each.shape[2] for each in one.image_inputs] == [3, 6, 6], "prompts and the adapters' matrices"
    pixels = probe_images(32)[:2]
    parts = zip(one.image_inputs, other.image_inputs, strict=True)
    both = runtime.image(pixels, tuple(np.concatenate(part, 1) for part in parts))
    np.testing.assert_allclose(both[:1], runtime.image(pixels[:1], one.image_inputs), atol=1e-5)
    np.testing.assert_allclose(both[1:], runtime.image(pixels[1:], other.image_inputs), atol=1e-5)
    assert np.abs(both[0] - runtime.image(pixels[:1], other.image_inputs)[0]).max() > 0.01


@needs("openvino")
def test_one_export_serves_every_number_of_prompts(tiny_model: Path, cache: Path) -> None:
    first = moved(tiny_model, ModelConfig(), cache)
    longer = moved(tiny_model, ModelConfig(prompt=PromptConfig(length=6)), cache)
    lengths = [case.state.text_prompts.inputs[0].shape[3] for case in (first, longer)]
    assert lengths == [5, 7], "SOS and the prompts"
    assert first.export() == longer.export()
    check_vectors(longer.state, first.open("openvino").runtime, reference_vectors(longer.model))


def test_feature_adapters_leave_no_thread_of_blas_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy's own library is meant; FAISS and SciPy have others."""
    found: list[int] = []

    def noted(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        found.append(threads())
        return vectors

    def threads() -> int:
        (library,) = (each for each in ThreadpoolController().lib_controllers if "numpy" in each.filepath)
        return int(library.num_threads)

    monkeypatch.setattr("dcar_core.encoder.state.normalize", noted)
    down, up = np.ones((8, 32), np.float32), np.ones((32, 8), np.float32)
    with threadpool_limits(2, "blas"):
        FeatureAdapterArrays(down, down[:, 0], up, up[:, 0])(np.ones((4, 32), np.float32))
        assert threads() == 2
    assert found == [1]


def test_length_batches_pad_little() -> None:
    groups = group_by_length(np.random.default_rng(0).integers(5, 60, 300), 32)
    assert sorted(np.concatenate(groups).tolist()) == list(range(300))
    assert max(map(len, groups)) <= 32
    assert len(group_by_length(np.array([5] * 8 + [60]), 32)) == 2
    assert len(group_by_length(np.array([5, 5, 60]), 32)) == 1, "another pass costs more than the padding"
    assert len(group_by_length(np.full(10, 7), 32)) == 1


@pytest.mark.parametrize(
    ("device", "installed", "instructions", "names"),
    [
        ("cpu", True, "flags : sse2 avx512_bf16", ["openvino-bf16", "openvino", "torch"]),
        ("cpu", True, "Features : fp asimd bf16", ["openvino-bf16", "openvino", "torch"]),
        ("cpu", True, "flags : sse2 avx2", ["openvino", "torch"]),
        ("cpu", True, None, ["openvino", "torch"]),
        ("cpu", False, "flags : sse2 avx512_bf16", ["torch"]),
        ("cuda", True, "flags : sse2 avx512_bf16", ["cuda", "torch"]),
        ("mps", True, "flags : sse2 avx512_bf16", ["torch"]),
    ],
)
def test_auto_decides_by_device_libraries_and_instructions(
    device: str, installed: bool, instructions: str | None, names: list[str], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setattr(machine, "is_installed", lambda library: installed)
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    if instructions is not None:
        (tmp_path / "cpuinfo").write_text(f"processor : 0\n{instructions}\n")
    assert auto_runtimes(device) == names


@needs("time")
@pytest.mark.slow
def test_a_compiled_runtime_needs_a_handful_of_graphs(
    tiny_model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few graphs cover all batch sizes and lengths: compiling one per shape would delay requests."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    whole = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **given: whole(self, backend=backend, **given))
    case = moved(tiny_model, DEEP, cache)
    plain, half = case.open("torch"), Encoder(case.state, case.model, TorchRuntime(case.model, is_half=True))
    texts = [" ".join("abcdefghijklmnopqrstuvw"[: 1 + i % 20]) for i in range(40)]
    groups = [texts[:n] for n in (1, 2, 3, 7, 32)] + [[text] for text in texts] + [[""], ["", ""]]
    for group in groups:
        np.testing.assert_allclose(half.encode_text(group), plain.encode_text(group), atol=5e-3)
    assert len(graphs) <= 6
    pixels = np.tile(probe_images(32), (9, 1, 1, 1))
    for n in (1, 2, 3, 8, 33):
        np.testing.assert_allclose(half.encode_pixels(pixels[:n]), plain.encode_pixels(pixels[:n]), atol=5e-3)
    assert len(graphs) <= 9


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["torch", "cuda"])
def test_gpu_gives_the_same_vectors(tiny_checkpoint: Path, tmp_path: Path, name: str) -> None:
    wanted = Encoder.load(tiny_checkpoint, device="cpu")
    given = Encoder.load(tiny_checkpoint, device="cuda", runtime=name, cache=tmp_path)
    texts, pixels = [" ".join("abcdefghij"[: 1 + i % 10]) for i in range(40)], np.tile(probe_images(32), (10, 1, 1, 1))

    def both(encoder: Encoder) -> NDArray[np.float32]:
        parts = [encoder.encode_pixels(pixels[:n]) for n in (1, 7, 40)]
        return np.concatenate([encoder.encode_text(texts), encoder.encode_text(texts[:1]), *parts])

    with ThreadPoolExecutor(2) as pool:  # as the service and the index job do, not in the thread that loaded it
        found = list(pool.map(both, [given, given]))
    for vectors in found:
        assert (vectors * both(wanted)).sum(1).min() > 0.999


@pytest.mark.parametrize("side", [0, 1], ids=["text", "image"])
def test_a_single_vector_below_the_threshold_is_enough(tiny_model: Path, tmp_path: Path, side: int) -> None:
    case = moved(tiny_model, PLAIN, tmp_path)
    encoder = case.open("torch")
    expected = reference_vectors(case.model)

    def check(cosine: float) -> None:
        wrong = [vectors.copy() for vectors in expected]
        wrong[side][-1] *= cosine
        check_vectors(case.state, encoder.runtime, (wrong[0], wrong[1]))

    check(LEAST_COSINE + 0.0002)
    for wrong in (LEAST_COSINE - 0.0002, np.nan):
        with pytest.raises(RuntimeUnavailableError, match=r"cosine .* at least 0\.999 is required"):
            check(wrong)


NAMES = auto_exports()
NAME = NAMES[0] if NAMES else "openvino"


@pytest.fixture
def chosen(exports: Path, tmp_path: Path) -> Path:
    """A cache with an export that a test may break. Each load has a backbone of its own, as at a start."""
    copy_exports(exports, tmp_path / "cache")
    return tmp_path / "cache"


def auto(checkpoint: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> tuple[str, list[str]]:
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


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("tensorrt", r"no runtime is named 'tensorrt'; there are: auto, torch, "),
        ("cuda", "cuda needs --device cuda, but the device is cpu"),
        ("openvino-int8", r"there are: auto, torch, cuda, openvino-bf16, openvino$"),
    ],
)
def test_a_runtime_that_cannot_be_used_says_why(name: str, says: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeUnavailableError, match=says):
        by_name(tiny_checkpoint, tmp_path, name)


@pytest.mark.slow
def test_missing_extras_and_processor_instructions_are_named(
    tiny_checkpoint: Path, chosen: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "cpuinfo").write_text("flags : sse2 avx2\n")
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    with pytest.raises(RuntimeUnavailableError, match=r"no bf16 instructions \(.*avx512_bf16"):
        by_name(tiny_checkpoint, chosen, "openvino-bf16")
    assert auto(tiny_checkpoint, chosen, caplog) == ("openvino", [])
    monkeypatch.setitem(sys.modules, "openvino", None)  # what importing it does when it is not installed
    assert auto(tiny_checkpoint, chosen, caplog) == ("torch", [])
    with pytest.raises(MissingExtraError, match=r"dcar\[openvino\]"):
        by_name(tiny_checkpoint, chosen, "openvino")


def refuse_to_convert(*_: object, **__: object) -> None:
    raise ValueError("aten::something is not supported\nand a long story")


def block(cache: Path) -> None:
    shutil.rmtree(cache)
    cache.touch()


def flip(cache: Path) -> None:
    values = bytearray((export(cache) / "text.bin").read_bytes())
    values[1000] ^= 1
    (export(cache) / "text.bin").write_bytes(values)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (flip, "is corrupted.* delete it for a new one"),
        (lambda cache: (export(cache) / "text.bin").unlink(), "is incomplete.* delete it for a new one"),
        (lambda cache: (export(cache) / "manifest.json").write_text("{"), "is incomplete.* delete it for a new one"),
        (
            lambda cache: shutil.rmtree(cache / "exports"),
            "cannot be exported for openvino: aten::something is not",
        ),
        (block, "cannot be used: .* name another directory"),
    ],
    ids=["flipped", "gone", "no json", "fails", "unwritable"],
)
def test_export_that_cannot_be_used_is_refused_or_replaced_by_torch(
    tiny_checkpoint: Path, chosen: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[Path], object], says: str,
) -> None:  # fmt: skip
    import openvino

    monkeypatch.setattr(openvino, "convert_model", refuse_to_convert)
    fault(chosen)
    name, warnings = auto(tiny_checkpoint, chosen, caplog)
    assert name == "torch"
    assert len(warnings) == len(NAMES)
    assert all(re.search(says.partition(".*")[0], warning) for warning in warnings)
    with pytest.raises(RuntimeUnavailableError, match=says):
        by_name(tiny_checkpoint, chosen)


@needs("openvino")
@pytest.mark.slow
def test_full_disk_is_not_blamed_on_the_model(tiny_checkpoint: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from dcar_core import Encoder; "
        "Encoder.load(Path(sys.argv[1]), device='cpu', runtime='openvino', cache=Path(sys.argv[2]))"
    )
    done = run("-c", code, tiny_checkpoint, tmp_path / "cache", file_size=100_000)
    assert f"exports in {tmp_path / 'cache'} cannot be used: an export cannot be written" in done.stderr


def test_one_variable_names_the_cache_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.delenv("DCAR_RUNTIME_CACHE", raising=False)
    assert default_cache_directory() == tmp_path / "user" / "dcar"
    monkeypatch.setenv("DCAR_RUNTIME_CACHE", str(tmp_path / "named"))
    assert default_cache_directory() == tmp_path / "named"


def test_remains_of_a_killed_export_are_deleted(tiny_checkpoint: Path, chosen: Path) -> None:
    whole = export(chosen)
    left = whole.rename(whole.with_name(f"{whole.name}.part-killed"))
    by_name(tiny_checkpoint, chosen)
    assert export(chosen) == whole
    assert not left.exists()


def reversed_columns(*given: Any) -> Any:
    return TEXT(*given)[:, ::-1].copy()


def fails(*given: object) -> None:
    """Raise what a library pleases, as a compiler that is not there does, or a GPU without memory."""
    raise RuntimeError("Failed to find C compiler.\nand a long story")


TEXT = OpenVinoRuntime.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tower", "broken", "says"),
    [
        ("text", reversed_columns, "its vectors are not float32's here: cosine"),
        ("image", fails, r"RuntimeError: Failed to find C compiler\."),
    ],
)
def test_runtime_that_opens_but_does_not_work_is_replaced(
    tiny_checkpoint: Path, chosen: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
    tower: str, broken: object, says: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(OpenVinoRuntime, tower, broken)
    name, warnings = auto(tiny_checkpoint, chosen, caplog)
    assert name == "torch"
    for each, following, warning in zip(NAMES, [*NAMES[1:], "torch"], warnings, strict=True):
        assert re.search(f"{each} cannot be used: {says}.*; using the runtime {following} instead", warning)
    with pytest.raises(RuntimeUnavailableError, match=f"{NAME} cannot be used: {says}"):
        by_name(tiny_checkpoint, chosen)


@needs("openvino")
def test_conversion_sends_no_telemetry() -> None:
    code = (
        "from dcar_core.encoder.openvino_runtime import library; library()\n"
        "from openvino.tools.ovc import convert_impl, telemetry_utils\n"
        "print(telemetry_utils.tm.__name__, convert_impl.tm.__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["openvino.tools.ovc.telemetry_stub"] * 2
