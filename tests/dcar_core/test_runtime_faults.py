"""Faulty runtimes: an error when requested by name, one warning and another runtime with `auto`."""

import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dcar_core import Encoder
from dcar_core.runtimes.openvino_runtime import OpenVinoRuntime
from dcar_core.runtimes.registry import auto_exports
from dcar_core.util import machine
from dcar_core.util.errors import MissingExtraError, RuntimeUnavailableError
from dcar_core.util.files import default_cache_directory
from tests.support.commands import run
from tests.support.files import copy_exports
from tests.support.parts import needs

pytestmark = needs("openvino")


NAMES = auto_exports()
NAME = NAMES[0]


@pytest.fixture(scope="module")
def exported(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    by_name(tiny_checkpoint, cache)
    return cache / "exports"


@pytest.fixture
def chosen(exported: Path, tmp_path: Path) -> Path:
    """A cache with an export that a test may break. Each load has a backbone of its own, as at a start."""
    copy_exports(exported, tmp_path / "cache")
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
    (found,) = (path for path in (cache / "exports").iterdir() if path.is_dir())
    return found


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("tensorrt", r"no runtime is named 'tensorrt'; there are: auto, torch, "),
        ("cuda-fp16", "cuda-fp16 needs --device cuda, but the device is cpu"),
        ("openvino-int8", r"there are: auto, torch, cuda-fp16, openvino-bf16, openvino$"),
    ],
)
def test_a_runtime_that_cannot_be_used_says_why(name: str, says: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeUnavailableError, match=says):
        by_name(tiny_checkpoint, tmp_path, name)


@pytest.mark.slow
def test_missing_extra_is_named(
    tiny_checkpoint: Path, chosen: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)  # what importing it does when it is not installed
    assert auto(tiny_checkpoint, chosen, caplog) == ("torch", [])
    with pytest.raises(MissingExtraError, match=r"dcar\[openvino\]"):
        by_name(tiny_checkpoint, chosen)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("flipped", "is corrupted"),
        ("gone", "is incomplete"),
        ("no manifest", "is incomplete"),
        ("no json", "is incomplete"),
    ],
)
def test_changed_export_is_refused(
    tiny_checkpoint: Path, chosen: Path, caplog: pytest.LogCaptureFixture, fault: str, says: str
) -> None:
    weights, manifest = export(chosen) / "text.bin", export(chosen) / "manifest.json"
    if fault == "flipped":
        values = bytearray(weights.read_bytes())
        values[1000] ^= 1
        weights.write_bytes(values)
    elif fault == "no json":
        manifest.write_text("{")
    else:
        {"gone": weights, "no manifest": manifest}[fault].unlink()
    name, warnings = auto(tiny_checkpoint, chosen, caplog)
    assert name == "torch"
    assert [says in warning for warning in warnings] == [True] * len(NAMES)
    with pytest.raises(RuntimeUnavailableError, match=f"{says}.* delete it for a new one"):
        by_name(tiny_checkpoint, chosen)


def test_missing_processor_instructions_are_named(
    tiny_checkpoint: Path,
    chosen: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "cpuinfo").write_text("flags : sse2 avx2\n")
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    with pytest.raises(RuntimeUnavailableError, match=r"no bf16 instructions \(.*avx512_bf16"):
        by_name(tiny_checkpoint, chosen, "openvino-bf16")
    assert auto(tiny_checkpoint, chosen, caplog) == ("openvino", [])
    assert by_name(tiny_checkpoint, chosen, "openvino").runtime.name == "openvino"


def test_failed_export_falls_back_to_torch(
    tiny_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import openvino

    def fails(*_: object, **__: object) -> None:
        raise ValueError("aten::something is not supported\nand a long story")

    monkeypatch.setattr(openvino, "convert_model", fails)
    name, warnings = auto(tiny_checkpoint, tmp_path, caplog)
    assert name.startswith("torch")
    reason = "this model cannot be exported for openvino: aten::something is not supported"
    assert [warning for warning in warnings if reason in warning] == warnings
    with pytest.raises(RuntimeUnavailableError, match=reason):
        by_name(tiny_checkpoint, tmp_path)
    assert [path.name for path in (tmp_path / "exports").iterdir() if path.is_dir()] == []


@pytest.mark.slow
def test_full_disk_is_not_blamed_on_the_model(tiny_checkpoint: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from dcar_core import Encoder; "
        "Encoder.load(Path(sys.argv[1]), device='cpu', runtime='openvino', cache=Path(sys.argv[2]))"
    )
    done = run("-c", code, tiny_checkpoint, tmp_path / "cache", file_size=100_000)
    assert f"exports in {tmp_path / 'cache'} cannot be used: an export cannot be written" in done.stderr


def test_unwritable_cache_falls_back_to_torch(
    tiny_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    name, warnings = auto(tiny_checkpoint, blocked, caplog)
    assert name.startswith("torch")
    assert len(warnings) == len(NAMES)
    with pytest.raises(RuntimeUnavailableError, match=r"cannot be used: .* name another directory"):
        by_name(tiny_checkpoint, blocked)


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


def test_conversion_sends_no_telemetry() -> None:
    code = (
        "from dcar_core.runtimes.openvino_runtime import library; library()\n"
        "from openvino.tools.ovc import convert_impl, telemetry_utils\n"
        "print(telemetry_utils.tm.__name__, convert_impl.tm.__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["openvino.tools.ovc.telemetry_stub"] * 2
