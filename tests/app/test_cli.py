"""The command line as a whole: what a user can fix is one line."""

import gc
import json
import re
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import open_clip
import pytest
from safetensors.torch import save_file
from typer.testing import CliRunner

from app.cli import app, main
from app.cli.serving import serve_index
from dcar_core.model.config import MODEL_CONFIG
from dcar_core.training.train import STATE_FILE
from dcar_core.util.errors import DcarError, ImageError, ModelError
from dcar_core.util.machine import WEIGHTS_FILE
from index_jobs.rebuild import rebuild
from tests.support.files import write_file, write_json, write_jsonl
from tests.support.images import draw
from tests.support.tiny_models import tiny_config


def test_a_file_that_the_system_refuses_is_one_line(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    out = str(tmp_path / "file" / "below")
    monkeypatch.setattr(sys, "argv", ["dcar", "data", "negatives", str(tiny_data), "--out", out])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {out}: Not a directory"


@pytest.mark.parametrize("command", [["train", "--method", "dcarr"], ["evaluate", "--methods", "clip,dcarr"]])
def test_an_unknown_method_is_told_before_anything_is_loaded(command: list[str], tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [*command, "--data", str(tmp_path), "--out", "o", "--model", "no such model"])
    assert isinstance(done.exception, DcarError)
    assert "no method is named 'dcarr'" in str(done.exception)


@pytest.mark.parametrize(
    ("command", "option", "wanted"),
    [
        ("index build --gallery g --checkpoint c --out i", "--workers -1", "--workers"),
        ("index add i --gallery g", "--workers -1", "--workers"),
        ("train", "--loss text", "image-to-text"),
        ("evaluate", "--loss text", "image-to-text"),
        ("evaluate", "--seeds 0", "greater than or equal to 1"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_loaded(command: str, option: str, wanted: str) -> None:
    needed = "" if command.startswith("index") else " --data d --out o --model missing"
    done = CliRunner().invoke(app, f"{command}{needed} {option}")
    assert done.exit_code == 2
    assert option.split()[0] in done.output
    assert wanted in " ".join(done.output.replace("│", "").split())


def test_the_version_is_told() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"dcar {version('dcar')}\n"


def test_an_image_without_a_suffix_is_searched_by_its_content(
    built_index: Path, tiny_gallery: Path, tmp_path: Path
) -> None:
    picture, note = tmp_path / "photo", tmp_path / "note.txt"
    picture.write_bytes((tiny_gallery / "circle" / "red.png").read_bytes())
    note.write_text("red circle")
    options = ["--index", str(built_index), "-k", "1", "--json"]
    found = json.loads(CliRunner().invoke(app, ["search", str(picture), *options], catch_exceptions=False).stdout)
    assert (found["results"][0]["caption"], found["results"][0]["score"] > 0.999) == ("a red circle", True)
    hybrid = CliRunner().invoke(app, ["search", str(picture), *options, "--hybrid"])
    assert str(hybrid.exception) == "hybrid: needs a text query, whose words it looks up"
    refused = CliRunner().invoke(app, ["search", str(note), *options])
    assert isinstance(refused.exception, ImageError)
    assert str(refused.exception).startswith(f"{note}: ")
    words = "a red circle " * 400
    assert CliRunner().invoke(app, ["search", words, *options]).exit_code == 0, "too long for the name of a file"


def test_a_search_prints_titles_with_their_files(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        draw("red", "circle").save(write_file(tmp_path / f"photos/{name}.png", b""))
    write_jsonl(tmp_path / "photos/metadata.jsonl", {"file_name": "a.png", "title": "Red dot"}, {"file_name": "b.png"})
    rebuild(tmp_path / "photos", tiny_checkpoint, tmp_path / "index", workers=0, progress=False)
    done = CliRunner().invoke(app, ["search", "red", "--index", str(tmp_path / "index")], catch_exceptions=False)
    assert sorted(line.split("  ")[-1].strip() for line in done.stdout.splitlines()) == ["Red dot (a.png)", "b.png"]
    nothing = ["search", "red", "--index", str(tmp_path / "index"), "--filter", '{"title": "Blue"}']
    assert "no item fulfils the filter" in CliRunner().invoke(app, nothing, catch_exceptions=False).stderr


def test_training_ends_with_a_verdict(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    """With a learning rate of 0 nothing is learned, so the untouched model is as good."""
    command = ["train", "--data", tiny_data, "--model", tiny_model, "--epochs", "1", "--lr", "0", "--out", tmp_path]
    result = CliRunner().invoke(app, list(map(str, command)))
    assert result.exit_code == 3, result.output
    assert "adapted (query-prompts)" in result.stdout
    assert "Was it worth it? No" in result.stdout
    assert "Caveat: 6 validation pairs" in result.stdout
    assert re.search(r"among 6 validation images .*\nAmong all 18 images for training and validation,", result.stdout)
    assert (tmp_path / "trainables.safetensors").is_file()
    (tmp_path / STATE_FILE).write_text("of an unfinished run")
    result = CliRunner().invoke(app, [*map(str, command), "--method", "clip"])
    assert result.exit_code == 0, result.output  # nothing to learn, so nothing to judge
    assert (tmp_path / STATE_FILE).is_file(), "clip discarded the unfinished run of another method"


def test_a_finished_training_is_repeated_only_with_restart(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    data, out = shutil.copytree(tiny_data, tmp_path / "data"), tmp_path / "out"
    command = ["train", *map(str, ("--data", data, "--model", tiny_model, "--out", out)), "--epochs", "1", "--lr", "0"]
    first = CliRunner().invoke(app, command)
    written = (out / "trainables.safetensors").stat().st_mtime_ns

    def refusal(*options: str) -> str:
        done = CliRunner().invoke(app, [*command, *options])
        assert isinstance(done.exception, DcarError), done.output
        assert (out / "trainables.safetensors").stat().st_mtime_ns == written
        return str(done.exception)

    for same in ([], ["--method", "query-prompts"]):
        again = CliRunner().invoke(app, [*command, *same])
        head, _, verdict = again.stdout.partition("\n")
        assert re.fullmatch(rf"{out}: already trained: epoch 1, .*; --restart trains again", head)
        assert (again.exit_code, verdict) == (3, first.stdout.partition("\n")[2])
    remedy = "choose another --out, or replace it with --restart"
    assert refusal("--lr", "1e-3", "--seed", "1") == (
        f"{out} holds a checkpoint that was trained with another lr, seed; {remedy}"
    )
    assert "another method;" in refusal("--method", "clip-adapter")
    write_json(out / "config.json", json.loads((out / "config.json").read_text()) | {"training": {}})
    assert "another " in refusal()
    restarted = CliRunner().invoke(app, [*command, "--restart"])
    assert "already" not in restarted.stdout
    assert (out / "trainables.safetensors").stat().st_mtime_ns > written
    image, other, *_ = sorted(data.glob("*/*.png"))
    shutil.copy(image, other)
    written = (out / "trainables.safetensors").stat().st_mtime_ns
    assert "another training data" in refusal()


@pytest.mark.parametrize("command", ["train", "evaluate", "zero-shot"])
def test_an_output_that_cannot_be_written_is_told_before_a_model_is_loaded(
    command: str, tiny_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    data = [] if command == "zero-shot" else ["--data", str(tiny_data)]
    done = CliRunner().invoke(
        app, [command, *data, "--model", "no such model", "--out", str(tmp_path / "file" / "out")]
    )
    assert str(done.exception).endswith(f"cannot be written: {tmp_path / 'file'} is not a directory; give another")


def test_a_missing_query_image_is_told_before_the_index_is_opened(tmp_path: Path) -> None:
    for query in (["gone.jpg"], ["a cat", "--image", "gone.jpg"]):
        done = CliRunner().invoke(app, ["search", *query, "--index", str(tmp_path)])
        assert str(done.exception) == "gone.jpg: No such file"


def test_a_diverged_training_leaves_no_state_that_refuses_a_lower_rate(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    command = ["train", "--data", tiny_data, "--model", tiny_model, "--method", "prolip", "--epochs", "3"]
    command += ["--out", tmp_path]
    result = CliRunner().invoke(app, [*map(str, command), "--lr", "1e30"])
    assert str(result.exception) == "prolip diverged: the loss is inf in epoch 2; use a lower --lr"
    result = CliRunner().invoke(app, [*map(str, command), "--lr", "1e-4"])
    assert result.exit_code in (0, 3), result.output


@pytest.mark.parametrize("command", ["train", "zero-shot"])
def test_the_config_of_a_model_is_not_replaced(command: str, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Model directories of the hub have a config.json of their own beside open_clip's."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (model / "config.json").write_text('{"model_type": "clip"}')
    data = ["--data", tiny_data, "--epochs", "1"] if command == "train" else []
    result = CliRunner().invoke(app, [command, *map(str, data), "--model", str(model), "--out", str(model)])
    assert str(result.exception).endswith("is not of a checkpoint and would be replaced; name another --out")
    assert (model / "config.json").read_text() == '{"model_type": "clip"}'


def test_training_takes_the_method_that_the_towers_can_run(tiny_data: Path, tmp_path: Path) -> None:
    """A ResNet takes prompts in the text tower alone."""
    config = tiny_config("RN50", tmp_path)
    config["text_cfg"]["vocab_size"] = 49408  # of CLIP's tokenizer
    write_json(tmp_path / "resnet" / MODEL_CONFIG, {"model_cfg": config})
    save_file(open_clip.CLIP(**config).state_dict(), str(tmp_path / "resnet" / WEIGHTS_FILE))
    command = ["train", "--data", tiny_data, "--model", tmp_path / "resnet", "--epochs", "1", "--lr", "0", "--out"]
    result = CliRunner().invoke(app, [*map(str, command), str(tmp_path / "text")])
    assert "adapted (dcar+-text)" in result.stdout, result.output
    result = CliRunner().invoke(app, [*map(str, command), str(tmp_path / "named"), "--method", "dcar+"])
    assert isinstance(result.exception, ModelError)
    assert str(result.exception).endswith("use the method dcar+-text")
    named = ["evaluate", *map(str, command[1:]), str(tmp_path / "mixed"), "--methods", "clip,coop,maple"]
    result = CliRunner().invoke(app, named)
    assert str(result.exception).endswith("use the method coop")
    assert not (tmp_path / "mixed").exists(), "before the first training"
    evaluated = ["evaluate", *map(str, command[1:]), str(tmp_path / "results"), "--seeds", "1"]
    result = CliRunner().invoke(app, evaluated)
    assert (
        "comparing clip, coop, clip-adapter, dcar-text, dcar+-text: methods for a model of level text" in result.stderr
    )
    assert result.exit_code == 0, result.output
    assert "dcar+-text" in result.stdout


def test_serving_collects_garbage_but_not_what_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, bool]] = []
    gc.unfreeze()
    monkeypatch.setattr("app.server.serve", lambda _: seen.append((gc.isenabled(), gc.get_freeze_count() > 100_000)))
    serve_index(index=tmp_path)
    gc.unfreeze()
    assert seen == [(True, True)]
