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
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dcar_core.data import Annotations
from dcar_core.model.backbone import BackboneSource, load_backbone
from dcar_core.model.checkpoint import save_checkpoint
from dcar_core.model.dcar import seeded_model
from dcar_core.model.methods import find_method
from dcar_core.negatives import LETTER_FUNCTIONS
from tests.support import commands
from tests.support.files import write_json, write_jsonl
from tests.support.parts import needs
from tests.support.paths import ROOT

EMOJI, DOMAINS = ROOT / "examples" / "emoji", ("twemoji", "openmoji")
TABLES = {  # commands, and patterns of what they print
    "training_cost.py --model {model} --methods clip-adapter --pairs 8 --batch-size 4":
        r"\| clip-adapter \| 2,144 \|",  # two bottlenecks of 32 -> 16 -> 32
    "runtimes.py --checkpoint {work}/tiny-checkpoint --runtimes torch --pictures 4 --work {work}":
        r"\| reference \| .*\n\| torch \| \d+ \(.*\n\n4 captions, 4 images, ",
    "caption_counts.py {data} --model {model} --methods clip-adapter --seeds 1 --counts 10": r"\n\| 0 \|.*\n\| 10 \|",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Call a script's `main` with arguments, and return what it prints."""

    def call(script: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        capsys.readouterr()
        importlib.import_module(script).main()
        return capsys.readouterr().out

    return call


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    done = commands.run(ROOT / "benchmarks" / script, *arguments, environment={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return done


@needs("time")
@pytest.mark.slow
@pytest.mark.parametrize("command", TABLES, ids=lambda command: command.partition(".")[0])
def test_a_script_prints_its_table(
    command: str, tiny_model: Path, tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "tiny-checkpoint").symlink_to(tiny_checkpoint)  # in place of a model of real size
    printed = run(*command.format(model=tiny_model, data=tiny_data, work=tmp_path).split()).stdout
    assert re.search(TABLES[command], printed), printed


def test_negatives_are_made_of_the_captions_that_are_counted(tiny_data: Path) -> None:
    splits, _ = Annotations(tiny_data).load_all(("train", "val"))
    for data in splits.values():
        data.samples[:] = [replace(sample, negatives=("a caption of another image",)) for sample in data.samples]
    parts = importlib.import_module("caption_counts").written(splits, 10, 0, LETTER_FUNCTIONS)
    assert {name: len(part) for name, part in parts.items()} == {"train": 8, "val": 1}
    samples = parts["train"].samples
    assert all(sample.negatives and "a caption of another image" not in sample.negatives for sample in samples)
    categories = {category for sample in samples for category in sample.negative_categories}
    assert categories <= {sample.category for sample in samples}


@pytest.mark.parametrize("domain", DOMAINS)
def test_attribute_queries_are_of_images_without_a_copy(domain: str) -> None:
    asked = importlib.import_module("attributes").protocol(EMOJI / domain, "test")
    splits, _ = Annotations(EMOJI / domain).load_all()
    contents = [asked.images.read(name) for name in asked.images.images]
    assert len(set(contents)) == len(contents) == len(asked.facts)
    assert not set(contents) & {splits[name].read(image) for name in ("train", "val") for image in splits[name].images}
    assert len(asked.queries) > 400
    assert asked.grades(asked.queries).tolist() == [1.0] * len(asked.queries)
    assert (asked.grades(np.roll(asked.queries, 1)) < 1).any()


def test_categories_are_resampled(tmp_path: Path, main: Callable[..., str]) -> None:
    found = {
        name: {"pairs": 1 + 2 * i, "t2i_r1": 100 * (1 - i), "i2t_r1": 50.0} for i, name in enumerate(("dog", "cat"))
    }
    write_json(tmp_path / "results.json", {"methods": {name: {"runs": [{"categories": found}]} for name in "ab"}})
    for options, value in (((), "37.5"), (("--measure", "t2i_r1"), "25.0")):
        assert main("category_intervals", tmp_path, "a", "b", *options).startswith(f"a: {value} (")


def test_the_grade_is_the_share_of_facts_that_hold(
    tiny_data: Path, tiny_model: Path, reranking_checkpoint: Path, tmp_path: Path, main: Callable[..., str]
) -> None:
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {"category": f"woman {row['category']}, {row['color']}", "attributes": ["dark skin tone", "art"]}
    write_jsonl(data / "metadata.jsonl", *rows)
    splits = {name: [*json.loads((data / f"{name}.json").read_text()).values()] for name in ("train", "test")}
    kept, removed = (each["file_name"] for each in splits["test"][:2])
    shutil.copyfile(data / splits["train"][0]["file_name"], data / removed)
    asked = importlib.import_module("attributes").protocol(data, "test")
    assert kept in asked.images.images
    assert removed not in asked.images.images, "it is a copy of a training image"
    row = asked.images.images.index(kept)
    first = next(each for each in rows if each["file_name"] == kept)
    assert asked.images.samples[row].caption == f"{first['category']}, dark skin tone"
    for other, facts in enumerate(asked.facts):
        thing, _, color = asked.images.images[other].partition("/")
        same = kept.partition("/")
        expected = (2 + (thing == same[0]) + (color == same[2])) / 4
        assert asked.facts[row][0].held_in(facts[0]) == expected
    methods = (reranking_checkpoint, reranking_checkpoint, "--model", tiny_model, "--baseline", "query-prompts")
    printed = main("attributes", data, *methods)
    assert re.search(r"\n\| query-prompts \| 2 \| .* \| - \|\n\| query-prompts with rerank \| 2 \|", printed)


def test_weights_of_words_are_compared_with_shuffled_ones(
    tiny_data: Path, tiny_model: Path, tmp_path: Path, main: Callable[..., str]
) -> None:
    script, backbone = importlib.import_module("word_weights"), load_backbone(BackboneSource(str(tiny_model)))
    tokens = backbone.tokenize(["a red dog", "dog"])
    mask, weights = backbone.layout.caption_mask(tokens), torch.rand(2, 4, tokens.shape[1])
    moved = script.shuffled(weights, mask)
    assert not torch.equal(moved[0], weights[0])
    torch.testing.assert_close(moved.sort().values, weights.sort().values)
    torch.testing.assert_close(moved * ~mask[:, None], weights * ~mask[:, None])
    model = seeded_model(backbone, find_method("dcar").config, 0).eval()
    save_checkpoint(model, tmp_path / "dcar")
    printed = main("word_weights", tiny_data, tmp_path / "dcar", "--model", tiny_model)
    names = ("no weights", "predicted", "predicted, shuffled", "predicted, inverted", "exact", "exact, shuffled")
    assert [line.split(" | ")[0] for line in printed.splitlines() if line.endswith(") |")] == [f"| {n}" for n in names]


@pytest.mark.slow
def test_the_loop_of_clicks_ends_with_hits_by_week(tiny_model: Path, tiny_gallery: Path, tmp_path: Path) -> None:
    gallery = Path(shutil.copytree(tiny_gallery, tmp_path / "gallery"))
    rows = [json.loads(line) for line in (gallery / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {"id": row["file_name"], "category": row["caption"], "attributes": [row["color"], row["category"]]}
    write_jsonl(gallery / "metadata.jsonl", *rows)
    options = ("--weeks", 2, "--searches", 600, "--queries", 40, "--alone", "--model", tiny_model)
    done = run("loop.py", *options, "--gallery", gallery)
    *said, last = done.stdout.splitlines()
    hits = json.loads(last)
    assert [*hits] == ["on", "off", "honest", "clicks", "captions"]
    assert all(len(weeks) == 2 and all(0 <= hit <= 100 for hit in weeks) for weeks in hits.values())
    assert [line.partition(" ")[0] for line in said[1:]] == ["hostile", "a"]
    assert done.stderr.count("hostile, week ") == 8


@pytest.mark.slow
@needs("openvino", "hf")
def test_a_clip_for_photos_learns_from_other_categories_than_it_is_measured_on(tiny_data: Path, tmp_path: Path) -> None:
    import timm
    from tokenizers import Tokenizer, models
    from transformers import BertConfig, BertModel

    pack, maps = importlib.import_module("photo_base").pack, np.random.default_rng(0).normal(size=(2, 352, 5, 5))
    pixels = 1 - pack(maps, maps[0, :, 0, 0], np.full(352, 10.0)).reshape(2, 5, 16, 5, 16, 3) / 255
    above, below = np.split(pixels.transpose(0, 1, 3, 2, 4, 5).reshape(2, 5, 5, -1)[..., :704], 2, axis=3)
    assert np.allclose(maps[0, :, 0, 0] + 10 * (above - below), maps.transpose(0, 2, 3, 1), atol=0.02)

    bed, encoder, cnn = tmp_path / "bed", tmp_path / "encoder", tmp_path / "cnn.pth"
    torch.save(timm.create_model("tf_efficientnet_lite2").state_dict(), cnn)
    BertModel(BertConfig(vocab_size=2, hidden_size=12, num_hidden_layers=1)).save_pretrained(encoder)
    Tokenizer(models.WordLevel({"[PAD]": 0, "a": 1}, unk_token="a")).save(str(encoder / "tokenizer.json"))
    for part in ("noun", "verb", "adj", "adv"):
        (tmp_path / f"data.{part}").write_text("00001740 03 n 01 thing 0 000 | a small red thing\n")
    script, results = str(ROOT / "benchmarks" / "photo_base.py"), tmp_path / "results"
    missing = commands.run(script, "train", "--encoder", encoder, "--out", tmp_path)
    assert "known.jsonl does not exist" in missing.stderr
    data = f"--data {bed / tiny_data.name}.jsonl --images {bed / 'maps'}"
    for program, arguments in (
        (script, f"maps --data {tiny_data} --cnn {cnn} --out {bed}"),
        (script, f"train --encoder {encoder} --wordnet {tmp_path} --out {bed} --text-steps 1 --epochs 1"),
        ("app.cli", f"evaluate {data} --model {bed / 'base'} --methods clip --negatives off --out {results}"),
    ):
        done = commands.run(program, *arguments.split())
        assert done.returncode == 0, done.stderr
    assert "| clip |" in done.stdout
    known, own = ((bed / f"{name}.jsonl").read_text() for name in ("known", tiny_data.name))
    categories = [set(re.findall(r'"category": "(.*?)"', rows)) for rows in (known, own)]
    assert all(categories), categories
    assert not categories[0] & categories[1]


@pytest.mark.parametrize("script", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda script: script.stem)
def test_every_benchmark_is_imported_and_names_its_options(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    is_command = "__main__" in script.read_text()
    with pytest.raises(SystemExit, match="0") if is_command else nullcontext():
        runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out.lower().startswith("usage: " if is_command else "")
