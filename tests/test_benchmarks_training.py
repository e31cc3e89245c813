"""The benchmark scripts run, on a tiny CLIP; their figures are for a quiet machine."""

import importlib
import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from dcar_core.data import Annotations
from tests.support import commands
from tests.support.files import write_json, write_jsonl
from tests.support.parts import needs
from tests.support.paths import ROOT
from tests.support.vectors import clustered, unit

EMOJI = ROOT / "examples" / "emoji"
DOMAINS = ("twemoji", "openmoji")
TABLES = {  # commands, and patterns of what they print
    # two bottlenecks of 32 -> 16 -> 32
    "training_cost.py --model {model} --methods clip-adapter --pairs 8"
    " --batch-size 4": r"\| clip-adapter \| 2,144 \|",
    "runtimes.py --checkpoint {work}/tiny-checkpoint --runtimes torch --pictures 4"
    " --work {work}": (
        r"\| reference \| .*\n\| torch \| \d+ \(.*\n\n4 captions, 4 images, "
    ),
    "encode.py --memory 60 --threads 1": (
        r"(?s)scanned 60 pictures; the table takes \d+ MiB, \d\d\d bytes a picture"
        r".*encoded 60 pictures, \d+/s; peak \d+ MiB, \d+ MiB in a worker"
    ),
    "caption_counts.py {data} --model {model} --methods clip-adapter --seeds 1"
    " --counts 10": r"\n\| 0 \|.*\n\| 10 \|",
    "word_weights.py {data} {work}/tiny-checkpoint --model {model}": (
        r"\| no weights \|(.*\n)+\| exact, shuffled \|"
    ),
}


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def main(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Call a script's `main` with arguments, and return what it prints."""

    def call(script: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        capsys.readouterr()
        importlib.import_module(script).main()
        return capsys.readouterr().out

    return call


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    done = commands.run(
        ROOT / "benchmarks" / script,
        *arguments,
        environment={"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done


@needs("time")
@pytest.mark.slow
@pytest.mark.parametrize(
    "command", TABLES, ids=lambda command: command.partition(".")[0]
)
def test_a_script_prints_its_table(
    command: str,
    tiny_model: Path,
    tiny_checkpoint: Path,
    tiny_data: Path,
    tmp_path: Path,
) -> None:
    # in place of a model of real size
    (tmp_path / "tiny-checkpoint").symlink_to(tiny_checkpoint)
    printed = run(
        *command.format(model=tiny_model, data=tiny_data, work=tmp_path).split()
    ).stdout
    assert re.search(TABLES[command], printed), printed


@pytest.mark.slow
def test_index_kinds_shows_the_recall_of_each_kind_of_text(tmp_path: Path) -> None:
    for seed, (name, count) in enumerate(
        {"vectors": 300, "captions": 100, "words": 80}.items()
    ):
        np.save(tmp_path / f"{name}.npy", clustered(count, seed=seed))
    tasks = [
        "--kind",
        "flat",
        "--kind",
        "IVF8,Flat",
        "--tune",
        "captions",
        "--tune",
        "words",
        "--filters",
    ]
    first, _, head, _, *rows = run(
        "index_kinds.py",
        tmp_path,
        "--target",
        0.5,
        "--count",
        200,
        *tasks,
    ).stdout.splitlines()
    assert first == "200 vectors of 32:"
    assert [line.split(" | ")[1:3] for line in rows] == [
        [f"`{kind}`", source]
        for kind, source in product(("Flat", "IVF8,Flat"), ("captions", "words"))
    ]
    for row in (
        dict(zip(head.split(" | "), line.split(" | "), strict=True)) for line in rows
    ):
        lowest = 1 if "flat" in row["| kind"] else 0.5
        assert lowest <= min(float(row["captions"]), float(row["words"])) <= 1
        assert float(row["10 % allowed"].partition(", ")[2]) >= 0.9


def test_more_vectors_are_like_those_of_their_item() -> None:
    grown = importlib.import_module("emoji_vectors").grown
    encoded = unit(
        np.tile(clustered(10), (10, 1))[:93]
        + 0.05 * np.random.default_rng(0).normal(size=(93, 32))
    )
    more = np.concatenate(list(grown([encoded[:50], encoded[50:]], 200, 10)))
    assert (more[:93] == encoded).all()
    assert np.linalg.norm(more, axis=1) == pytest.approx(1)
    assert (
        np.argmax(more @ encoded[:10].T, 1) == np.arange(200) % 93 % 10
    ).mean() > 0.9
    assert not (more[93:, None] == encoded).all(2).any()


@pytest.mark.parametrize("domain", DOMAINS)
def test_attribute_queries_are_of_images_without_a_copy(domain: str) -> None:
    asked = importlib.import_module("attributes").protocol(EMOJI / domain, "test")
    splits, _ = Annotations(EMOJI / domain).load_all()
    contents = [asked.images.read(name) for name in asked.images.images]
    assert len(set(contents)) == len(contents) == len(asked.facts)
    assert not set(contents) & {
        splits[name].read(image)
        for name in ("train", "val")
        for image in splits[name].images
    }
    assert len(asked.queries) > 400
    assert asked.grades(asked.queries).tolist() == [1.0] * len(asked.queries)
    assert (asked.grades(np.roll(asked.queries, 1)) < 1).any()


def test_categories_are_resampled(tmp_path: Path, main: Callable[..., str]) -> None:
    found = {
        name: {
            "pairs": 1 + 2 * i,
            "t2i_r1": 100 * (1 - i),
            "i2t_r1": 50.0,
        }
        for i, name in enumerate(("dog", "cat"))
    }
    write_json(
        tmp_path / "results.json",
        {"methods": {name: {"runs": [{"categories": found}]} for name in "ab"}},
    )
    for options, value in (((), "37.5"), (("--measure", "t2i_r1"), "25.0")):
        assert main("category_intervals", tmp_path, "a", "b", *options).startswith(
            f"a: {value} ("
        )


@pytest.mark.slow
@needs("time")
def test_the_loop_of_clicks_ends_with_hits_by_week(
    tiny_model: Path,
    tiny_gallery: Path,
    tmp_path: Path,
) -> None:
    gallery = Path(shutil.copytree(tiny_gallery, tmp_path / "gallery"))
    rows = [
        json.loads(line)
        for line in (gallery / "metadata.jsonl").read_text().splitlines()
    ]
    for row in rows:
        row |= {
            "id": row["file_name"],
            "category": row["caption"],
            "attributes": [row["color"], row["category"]],
        }
    write_jsonl(gallery / "metadata.jsonl", *rows)
    options = (
        "--weeks",
        2,
        "--searches",
        600,
        "--queries",
        40,
        "--alone",
        "--model",
        tiny_model,
    )
    done = run("loop.py", *options, "--gallery", gallery)
    *said, last = done.stdout.splitlines()
    hits = json.loads(last)
    assert [*hits] == ["on", "off", "honest", "clicks", "captions"]
    assert all(
        len(weeks) == 2 and all(0 <= hit <= 100 for hit in weeks)
        for weeks in hits.values()
    )
    assert [line.partition(" ")[0] for line in said[1:]] == ["hostile", "a"]
    assert done.stderr.count("hostile, week ") == 8


@pytest.mark.parametrize(
    "script",
    sorted((ROOT / "benchmarks").glob("*.py")),
    ids=lambda script: script.stem,
)
def test_every_benchmark_is_imported_and_names_its_options(
    script: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    is_command = "__main__" in script.read_text()
    with pytest.raises(SystemExit, match="0") if is_command else nullcontext():
        runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out.lower().startswith("usage: " if is_command else "")
