"""The command line and the settings as a whole: what a user can fix is one line."""

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
from typer.testing import CliRunner, Result

from app.cli import app, main
from app.cli.serving import serve_index
from app.core.callers import is_key, key_hash
from app.core.settings import load_settings
from dcar_core.model.config import MODEL_CONFIG
from dcar_core.training.train import STATE_FILE
from dcar_core.util.errors import DcarError, ImageError
from dcar_core.util.machine import WEIGHTS_FILE
from index_jobs.rebuild import rebuild
from tests.support.files import write_file, write_json, write_jsonl
from tests.support.images import draw
from tests.support.tiny_models import tiny_config


def dcar(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_a_file_that_the_system_refuses_is_one_line(
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    out = str(tmp_path / "file" / "below")
    monkeypatch.setattr(
        sys,
        "argv",
        ["dcar", "data", "negatives", str(tiny_data), "--out", out],
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {out}: Not a directory"


@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        ("--version", 0, f"dcar {version('dcar')}"),
        ("index build --gallery g --checkpoint c --out i --workers -1", 2, "--workers"),
        ("index add i --gallery g --workers -1", 2, "--workers"),
        ("train --data d --out o --loss text", 2, "image-to-text"),
        ("evaluate --data d --out o --seeds 0", 2, "greater than or equal to 1"),
        (
            "train --data d --out o --model missing --method dcarr",
            1,
            "no method is named 'dcarr'",
        ),
        (
            "evaluate --data d --out o --model missing --methods clip,dcarr",
            1,
            "no method is named 'dcarr'",
        ),
        ("search gone.jpg --index {index}", 1, "gone.jpg: No such file"),
        ("search cat --image gone.jpg --index {index}", 1, "gone.jpg: No such file"),
        (
            "train --data d --model missing --out {file}/out",
            1,
            "{file} is not a directory; give another",
        ),
        (
            "evaluate --data d --model missing --out {file}/out",
            1,
            "{file} is not a directory; give another",
        ),
        (
            "zero-shot --model missing --out {file}/out",
            1,
            "{file} is not a directory; give another",
        ),
    ],
)
def test_a_mistake_is_told_before_anything_is_loaded(
    command: str,
    status: int,
    said: str,
    tmp_path: Path,
) -> None:
    (tmp_path / "file").touch()
    places = {"index": tmp_path, "file": tmp_path / "file"}
    done = dcar(*command.format(**places).split())
    assert done.exit_code == status
    assert said.format(**places) in " ".join(done.output.split()) + str(done.exception)


def test_image_without_a_suffix_is_searched_by_content(
    built_index: Path,
    tiny_gallery: Path,
    tmp_path: Path,
) -> None:
    picture = tmp_path / "photo"
    note = tmp_path / "note.txt"
    picture.write_bytes((tiny_gallery / "circle" / "red.png").read_bytes())
    note.write_text("red circle")
    options = ("--index", built_index, "-k", 1, "--json")
    (result,) = json.loads(dcar("search", picture, *options).stdout)["results"]
    assert result["caption"] == "a red circle"
    assert result["score"] > 0.999
    hybrid = dcar("search", picture, *options, "--hybrid")
    assert (
        str(hybrid.exception) == "hybrid: needs a text query, whose words it looks up"
    )
    refused = dcar("search", note, *options)
    assert isinstance(refused.exception, ImageError)
    assert str(refused.exception).startswith(f"{note}: ")
    assert dcar("search", "a red circle " * 400, *options).exit_code == 0, (
        "too long for the name of a file"
    )


def test_a_search_prints_titles_with_their_files(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        draw("red", "circle").save(write_file(tmp_path / f"photos/{name}.png", b""))
    write_jsonl(
        tmp_path / "photos/metadata.jsonl",
        {"file_name": "a.png", "caption": "", "title": "Red dot"},
    )
    rebuild(
        tmp_path / "photos",
        tiny_checkpoint,
        tmp_path / "index",
        workers=0,
        progress=False,
    )
    lines = dcar("search", "red", "--index", tmp_path / "index").stdout.splitlines()
    assert sorted(line.split("  ")[-1].strip() for line in lines) == [
        "Red dot (a.png)",
        "b (b.png)",
    ]
    nothing = dcar(
        "search",
        "red",
        "--index",
        tmp_path / "index",
        "--filter",
        '{"title": "Blue"}',
    )
    assert "no item fulfils the filter" in nothing.stderr


def test_a_finished_training_is_repeated_only_with_restart(
    tiny_model: Path,
    tiny_data: Path,
    tmp_path: Path,
) -> None:
    """With a learning rate of 0 nothing is learned, so the untouched model is as
    good.
    """
    data = shutil.copytree(tiny_data, tmp_path / "data")
    out = tmp_path / "out"
    command = (
        "train",
        "--data",
        data,
        "--model",
        tiny_model,
        "--out",
        out,
        "--epochs",
        1,
        "--lr",
        0,
    )
    first = dcar(*command)
    assert first.exit_code == 3, first.output
    for said in (
        "adapted (query-prompts)",
        "Was it worth it? No",
        "Caveat: 6 validation pairs",
    ):
        assert said in first.stdout
    assert re.search(
        r"among 6 validation images .*\nAmong all 18 images for training and"
        r" validation,",
        first.stdout,
    )
    written = (out / "trainables.safetensors").stat().st_mtime_ns

    def refusal(*options: object) -> str:
        done = dcar(*command, *options)
        assert isinstance(done.exception, DcarError), done.output
        assert (out / "trainables.safetensors").stat().st_mtime_ns == written
        return str(done.exception)

    for same in ([], ["--method", "query-prompts"]):
        again = dcar(*command, *same)
        head, _, verdict = again.stdout.partition("\n")
        assert re.fullmatch(
            rf"{out}: already trained: epoch 1, .*; --restart trains again", head
        )
        assert again.exit_code == 3
        assert verdict == first.stdout.partition("\n")[2]
    remedy = "choose another --out, or replace it with --restart"
    assert (
        refusal("--lr", "1e-3", "--seed", 1)
        == f"{out} holds a checkpoint that was trained with another lr, seed; {remedy}"
    )
    assert "another method;" in refusal("--method", "clip-adapter")
    write_json(
        out / "config.json",
        json.loads((out / "config.json").read_text()) | {"training": {}},
    )
    assert "another " in refusal()
    assert "already" not in dcar(*command, "--restart").stdout
    assert (out / "trainables.safetensors").stat().st_mtime_ns > written
    image, other, *_ = sorted(data.glob("*/*.png"))
    shutil.copy(image, other)
    written = (out / "trainables.safetensors").stat().st_mtime_ns
    assert "another training data" in refusal()
    (out / STATE_FILE).write_text("of an unfinished run")
    untouched = dcar(*command, "--method", "clip")
    # nothing to learn, so nothing to judge
    assert untouched.exit_code == 0, untouched.output
    assert (out / STATE_FILE).is_file(), (
        "clip discarded the unfinished run of another method"
    )


@pytest.mark.parametrize("command", ["train", "zero-shot"])
def test_the_config_of_a_model_is_not_replaced(
    command: str,
    tiny_model: Path,
    tiny_data: Path,
    tmp_path: Path,
) -> None:
    """Model directories of the hub have a config.json of their own beside
    open_clip's.
    """
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (model / "config.json").write_text('{"model_type": "clip"}')
    data = ["--data", tiny_data, "--epochs", 1] if command == "train" else []
    done = dcar(command, *data, "--model", model, "--out", model)
    assert str(done.exception).endswith(
        "is not of a checkpoint and would be replaced; name another --out"
    )
    assert (model / "config.json").read_text() == '{"model_type": "clip"}'


def test_training_takes_the_method_that_the_towers_can_run(
    tiny_data: Path, tmp_path: Path
) -> None:
    """A ResNet takes prompts in the text tower alone."""
    config = tiny_config("RN50", tmp_path)
    config["text_cfg"]["vocab_size"] = 49408  # of CLIP's tokenizer
    write_json(tmp_path / "resnet" / MODEL_CONFIG, {"model_cfg": config})
    save_file(
        open_clip.CLIP(**config).state_dict(), str(tmp_path / "resnet" / WEIGHTS_FILE)
    )
    options = (
        "--data",
        tiny_data,
        "--model",
        tmp_path / "resnet",
        "--epochs",
        1,
        "--lr",
        0,
    )
    assert (
        "adapted (dcar+-text)"
        in dcar("train", *options, "--out", tmp_path / "text").stdout
    )
    mixed = dcar(
        "evaluate",
        *options,
        "--out",
        tmp_path / "mixed",
        "--methods",
        "clip,coop,maple",
    )
    assert str(mixed.exception).endswith("use coop, dcar-text or dcar+-text")
    assert not (tmp_path / "mixed").exists(), "before the first training"
    done = dcar("evaluate", *options, "--out", tmp_path / "results", "--seeds", 1)
    assert done.exit_code == 0, done.output
    assert (
        "comparing clip, coop, clip-adapter, dcar-text, dcar+-text: methods for a model"
        " of level tex" in done.stderr
    )
    assert "dcar+-text" in done.stdout


def test_serving_collects_garbage_but_not_what_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, bool]] = []
    gc.unfreeze()
    monkeypatch.setattr(
        "app.server.serve",
        lambda _: seen.append((gc.isenabled(), gc.get_freeze_count() > 100_000)),
    )
    serve_index(index=tmp_path)
    gc.unfreeze()
    assert seen == [(True, True)]


def test_flags_take_precedence_over_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DCAR_PORT", "9000")
    monkeypatch.setenv("DCAR_MAX_K", "17")
    monkeypatch.setenv("DCAR_REDIS_URL", "")
    settings = load_settings(index=tmp_path, port=9001, host=None)
    assert settings.port == 9001
    assert settings.max_k == 17
    assert settings.host == "127.0.0.1"
    assert settings.redis_url is None


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("PROT", "DCAR_PROT: unknown setting; did you mean DCAR_PORT"),
        ("REDIS", "DCAR_REDIS: unknown setting; did you mean DCAR_REDIS_URL"),
        ("MAXK", "DCAR_MAXK: unknown setting; did you mean DCAR_MAX_K"),
        ("MAX_QUEUE_MS", "DCAR_MAX_QUEUE_MS: .*DCAR_MAX_PENDING and DCAR_DEADLINE_MS"),
        ("TRACING", "DCAR_TRACING: .*opentelemetry-instrument"),
    ],
)
def test_a_mistyped_or_removed_variable_ends_the_start_with_the_name_that_was_meant(
    variable: str,
    meant: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv(f"DCAR_{variable}", "1")
    with pytest.raises(DcarError, match=meant):
        load_settings(index=tmp_path)


def test_variables_of_other_programs_are_ignored(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in (
        "FEATURES",
        "CAPTION_API_KEY",
        "DOMAIN",
        "SERVICE_HOST",
        "PORT_8000_TCP_ADDR",
    ):
        monkeypatch.setenv(f"DCAR_{name}", "x")
    load_settings(index=tmp_path)


def test_secrets_are_read_from_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = write_file(tmp_path / "key", b"a long secret key\n")
    monkeypatch.setenv("DCAR_ADMIN_KEY_FILE", str(file))
    settings = load_settings(index=tmp_path)
    assert settings.admin_key is not None
    assert is_key("a long secret key", settings.admin_key.get_secret_value())
    monkeypatch.setenv("DCAR_ADMIN_KEY", "another secret key")
    with pytest.raises(
        DcarError, match="DCAR_ADMIN_KEY_FILE: DCAR_ADMIN_KEY is set as well"
    ):
        load_settings(index=tmp_path)


@pytest.mark.parametrize("name", ["sha256", "admin", "the.admin"])
def test_the_line_of_a_key_is_its_hash_and_not_the_password(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    digest = key_hash("a long secret key")
    monkeypatch.setenv("DCAR_ADMIN_KEY", f"{name}:{digest.upper()}")
    settings = load_settings(index=tmp_path)
    assert settings.admin_key is not None
    secret = settings.admin_key.get_secret_value()
    assert is_key("a long secret key", secret)
    for wrong in (digest, f"{name}:{digest}", secret):
        assert not is_key(wrong, secret)


WRONG = [
    ("ADMIN_KEY_FILE", ["/dev/null", "/nowhere/key"], ""),
    ("PORT", ["many"], ""),
    ("ADMIN_KEY", ["tiny&", "fifteen letters"], "at least 16"),
    (
        "ADMIN_KEY",
        [f"sha256:{'a' * 63}", "sha256:0123456789abcdef"],
        "64 hexadecimal digits",
    ),
    ("FEEDBACK_TEXTS", ["true"], "needs DCAR_FEEDBACK"),
    ("API_KEYS", ["x", " , ", "shop:abcdef"], ""),
    (
        "COLLECTIONS",
        ["a=b", '["index"]', '{"a": 5}', '{".hidden": "x"}', '{"a/b": "x"}'],
        "",
    ),
    (
        "CORS_ORIGINS",
        ["shop", "https://shop.example/path", "https://*.shop.example"],
        "https://shop.example",
    ),
    (
        "IMAGE_HOSTS",
        ["https://a.example", "a.example/pictures", "b.example, a.example:8080"],
        "pictures.example.org",
    ),
    ("IMAGE_FORMATS", ["jpg", ","], ""),
    (
        "RATE_LIMIT",
        ["fast", "20/second, 600/minute", "0/second", "-1/second", "20"],
        "20/second",
    ),
    ("WRITES", ["true"], "needs DCAR_ADMIN_KEY, or a key in DCAR_API_KEYS"),
    ("REDIS_URL", ["http://localhost"], "redis://"),
]


@pytest.mark.parametrize(("name", "values", "message"), WRONG)
def test_a_wrong_value_is_refused_by_the_name_of_its_setting(
    name: str,
    values: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    for value in values:
        monkeypatch.setenv(f"DCAR_{name}", value)
        with pytest.raises(DcarError, match=f"DCAR_{name}.*{message}") as caught:
            load_settings(index=tmp_path)
        assert name != "ADMIN_KEY" or value not in str(caught.value)


def test_an_index_is_needed_and_has_a_name_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(DcarError, match="DCAR_INDEX"):
        load_settings()
    with pytest.raises(DcarError, match="DCAR_COLLECTIONS"):
        load_settings(index=tmp_path, collections={tmp_path.name: tmp_path})


def test_values_are_read_as_requests_send_them_and_secrets_are_not_shown(
    tmp_path: Path,
) -> None:
    secrets = {"admin_key": "a long secret key", "redis_url": "redis://:pass@localhost"}
    origins = "https://shop.example, https://other.example"
    settings = load_settings(
        index=tmp_path,
        cors_origins=origins,
        image_hosts="Pictures.Example",
        **secrets,
    )
    assert settings.cors_origins == ("https://shop.example", "https://other.example")
    assert settings.image_hosts == ("pictures.example",)
    assert "a long secret" not in repr(settings)
    assert "pass" not in repr(settings)
