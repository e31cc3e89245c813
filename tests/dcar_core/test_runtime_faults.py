"""Faulty runtimes: an error when requested by name, one warning and another runtime with `auto`."""

import json
import logging
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dcar_core import Encoder
from dcar_core.runtimes.export_cache import ExportKey, ensure_export
from dcar_core.util import machine
from dcar_core.util.errors import MissingExtraError, RuntimeUnavailableError
from dcar_core.util.files import default_cache_directory
from tests.support.commands import run
from tests.support.parts import needs

pytestmark = needs("openvino")


NAME = "openvino" if machine.missing_instructions("bf16") else "openvino-bf16"


@pytest.fixture
def chosen(exports: Path, tmp_path: Path) -> Path:
    """A cache with an export that a test may break. Each load has a backbone of its own, as at a start."""
    shutil.copytree(exports, tmp_path / "cache" / "exports")
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


@pytest.mark.slow
def test_sound_cache_gives_no_warning(tiny_checkpoint: Path, chosen: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert auto(tiny_checkpoint, chosen, caplog) == (NAME, [])
    assert by_name(tiny_checkpoint, chosen).runtime.name == NAME


def test_unknown_runtime_is_refused_with_the_known_ones(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeUnavailableError, match=r"no runtime is named 'tensorrt'; there are: auto, torch, "):
        by_name(tiny_checkpoint, tmp_path, "tensorrt")


@pytest.mark.slow
def test_missing_extra_is_named(
    tiny_checkpoint: Path, chosen: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)  # what importing it does when it is not installed
    name, (warning,) = auto(tiny_checkpoint, chosen, caplog)
    assert name == "torch"
    assert "pip install 'dcar[openvino]'; using the runtime torch instead" in warning
    with pytest.raises(MissingExtraError, match=r"dcar\[openvino\]"):
        by_name(tiny_checkpoint, chosen)


@pytest.mark.parametrize(("field", "value"), [("backbone", "0" * 64), ("library", "openvino 2019.1"), ("graphs", 0)])
def test_export_of_another_model_or_version_is_refused(
    tiny_checkpoint: Path, chosen: Path, caplog: pytest.LogCaptureFixture, field: str, value: object
) -> None:
    path = export(chosen) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    name, (warning,) = auto(tiny_checkpoint, chosen, caplog)
    assert name == "torch"
    assert f"made with other {field}" in warning
    with pytest.raises(RuntimeUnavailableError, match=f"other {field}.*delete .* made again"):
        by_name(tiny_checkpoint, chosen)


@pytest.mark.parametrize("fault", ["flipped", "gone", "no manifest", "no json"])
def test_corrupted_export_is_refused(
    tiny_checkpoint: Path, chosen: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    weights, manifest = export(chosen) / "text.bin", export(chosen) / "manifest.json"
    if fault == "flipped":
        content = bytearray(weights.read_bytes())
        content[1000] ^= 1
        weights.write_bytes(content)
    elif fault == "gone":
        weights.unlink()
    elif fault == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text("{")
    name, (warning,) = auto(tiny_checkpoint, chosen, caplog)
    assert name == "torch"
    assert "is corrupted" in warning or "is incomplete" in warning
    with pytest.raises(RuntimeUnavailableError, match=r"delete .* made again"):
        by_name(tiny_checkpoint, chosen)


def test_missing_processor_instructions_are_named(
    tiny_checkpoint: Path, chosen: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "instruction_sets", lambda: frozenset({"avx2"}))
    with pytest.raises(RuntimeUnavailableError, match=r"no bf16 instructions \(.*avx512_bf16"):
        by_name(tiny_checkpoint, chosen, "openvino-bf16")
    assert auto(tiny_checkpoint, chosen, caplog) == ("openvino", [])


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


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files as POSIX does")
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
    assert len(warnings) == 1
    with pytest.raises(RuntimeUnavailableError, match=r"cannot be used: .* name another directory"):
        by_name(tiny_checkpoint, blocked)


def test_one_variable_names_the_cache_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.delenv("DCAR_RUNTIME_CACHE", raising=False)
    assert default_cache_directory() == tmp_path / "user" / "dcar"
    monkeypatch.setenv("DCAR_RUNTIME_CACHE", str(tmp_path / "named"))
    assert default_cache_directory() == tmp_path / "named"


def test_remains_of_a_killed_export_are_deleted(tmp_path: Path) -> None:
    key = ExportKey("openvino", "a" * 64, "d0t0", "1")
    assert key.directory(tmp_path) != replace(key, graphs=0).directory(tmp_path), "of other graphs"
    left = key.directory(tmp_path).with_name(key.directory(tmp_path).name + ".part-killed")
    left.mkdir(parents=True)
    (left / "text.xml").write_bytes(b"half")

    def write(directory: Path) -> None:
        (directory / "text.xml").write_bytes(b"whole")

    made = ensure_export(key, tmp_path, write)
    assert (made / "text.xml").read_bytes() == b"whole"
    assert not left.exists()


def test_int8_needs_calibration(tiny_checkpoint: Path, tmp_path: Path) -> None:
    if machine.missing_instructions("int8"):
        pytest.skip(str(machine.missing_instructions("int8")))
    with pytest.raises(RuntimeUnavailableError, match="must first be calibrated on your images and captions: dcar"):
        by_name(tiny_checkpoint, tmp_path, "openvino-int8")


def test_runtime_for_another_device_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeUnavailableError, match="cuda-fp16 needs a GPU"):
        by_name(tiny_checkpoint, tmp_path, "cuda-fp16")


@pytest.mark.slow
def test_auto_never_takes_a_runtime_with_wrong_vectors(
    tiny_checkpoint: Path, chosen: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dcar_core.runtimes.openvino_runtime import OpenVinoRuntime

    right = OpenVinoRuntime.text
    monkeypatch.setattr(OpenVinoRuntime, "text", lambda *given: right(*given)[:, ::-1].copy())
    name, (warning,) = auto(tiny_checkpoint, chosen, caplog)
    assert name == "torch"
    assert "its vectors are not those of float32 here: cosine" in warning
    with pytest.raises(RuntimeUnavailableError, match=r"its vectors are not those of float32 here"):
        by_name(tiny_checkpoint, chosen)


@pytest.mark.slow
def test_runtime_that_fails_in_its_first_pass_is_replaced(
    tiny_checkpoint: Path, chosen: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a compiler that is not there, or a GPU without memory: it opens, and raises what its library pleases."""
    from dcar_core.runtimes.openvino_runtime import OpenVinoRuntime

    def fails(*given: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nand a long story")

    monkeypatch.setattr(OpenVinoRuntime, "image", fails)
    name, (warning,) = auto(tiny_checkpoint, chosen, caplog)
    assert name == "torch"
    assert "cannot be used: RuntimeError: Failed to find C compiler.; using the runtime torch instead" in warning
    with pytest.raises(
        RuntimeUnavailableError, match=f"{NAME} cannot be used: RuntimeError: Failed to find C compiler"
    ):
        by_name(tiny_checkpoint, chosen)


def test_conversion_sends_no_telemetry() -> None:
    code = (
        "from dcar_core.runtimes.openvino_runtime import library; library()\n"
        "from openvino.tools.ovc import convert_impl, telemetry_utils\n"
        "print(telemetry_utils.tm.__name__, convert_impl.tm.__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["openvino.tools.ovc.telemetry_stub"] * 2
