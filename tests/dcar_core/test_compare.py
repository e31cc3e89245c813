"""Methods compared by real runs on a tiny CLIP, tables and analysis, and the last lines
of `dcar train`.
"""

import json
import shutil
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dcar_core.evaluation.method_runner as module
from dcar_core.data import Annotations, Dataset
from dcar_core.evaluation import compare
from dcar_core.evaluation.comparison import add_significance
from dcar_core.evaluation.method_runner import MethodRunner, analyse, serving_cost
from dcar_core.evaluation.tables import COLUMNS, best_method, category_rows, plot_recall
from dcar_core.model.backbone import Backbone
from dcar_core.model.checkpoint import load_checkpoint
from dcar_core.model.config import PromptConfig, TrainConfig
from dcar_core.model.dcar import DCAR, seeded_model
from dcar_core.model.methods import find_method
from dcar_core.training.adapt import Verdict, verdict_of
from dcar_core.training.prepared_split import FeatureCache, prepare_split
from dcar_core.training.train import TrainResult, train
from dcar_core.training.validation import evaluate
from dcar_core.util.arrays import Floats
from dcar_core.util.errors import DataError, DivergedError, install_command
from dcar_core.util.metrics import Comparison, Scores
from tests.support.files import write_json
from tests.support.parts import needs

Compared = tuple[Path, dict[str, Any]]
METHODS = ["clip", "clip-adapter", "dcar"]
QUICK = TrainConfig(epochs=2, batch_size=6)
ONCE = replace(QUICK, epochs=1)
R1 = ("t2i_r1", "i2t_r1")


def trainings(messages: list[str]) -> list[str]:
    """Return the messages of `compare` that announce a training."""
    return [message for message in messages if "learning rate" in message]


@pytest.fixture(scope="module")
def compared(
    backbone: Backbone,
    tiny_data: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Compared:
    out = tmp_path_factory.mktemp("compared")
    return out, compare(backbone, tiny_data, METHODS, 2, out, QUICK)


@pytest.mark.slow
def test_results_are_reproduced_by_the_checkpoints(
    compared: Compared,
    backbone: Backbone,
    tiny_data: Path,
) -> None:
    out, results = compared
    assert json.loads((out / "results.json").read_text()) == results
    methods = results["methods"]
    text = (out / "results.md").read_text()
    assert [len(found["runs"]) for found in methods.values()] == [1, 2, 2]
    for name, found in methods.items():
        for column in COLUMNS:
            values = [run["test"][column] for run in found["runs"]]
            assert found["mean"][column] == pytest.approx(np.mean(values))
            assert found["std"][column] == pytest.approx(
                np.std(values, ddof=1) if len(values) > 1 else 0
            )
        value, low, high = found["intervals"]["mean_r1"]
        assert low <= value <= high
        assert value == pytest.approx(sum(found["mean"][key] for key in R1) / 2)
        assert 0 <= found["hard_negative_accuracy"]["mean"] <= 100
        assert (found["difference"] is None) == (name == "clip")
    assert methods["clip"]["trainable"] == 0
    valid = {
        name: np.mean(
            [run["val"][key] for run, key in product(methods[name]["runs"], R1)]
        )
        for name in methods
    }
    assert valid[best_method(results)] == max(valid.values())
    own, baseline = (
        methods[name]["intervals"]["mean_r1"][0] for name in ("dcar", "clip")
    )
    assert methods["dcar"]["difference"]["mean_r1"][0] == pytest.approx(own - baseline)
    for part in (
        "| dcar |",
        "± ",
        "difference to clip (95 % interval)",
        "Paired bootstrap",
    ):
        assert part in text
    run = methods["dcar"]["runs"][1]
    model, fingerprint = load_checkpoint(out / run["run"], backbone=backbone)
    test = prepare_split(
        Annotations(tiny_data).load("test")[0],
        model,
        for_training=False,
    )
    assert evaluate(model, test) == run["test"]
    assert fingerprint == run["fingerprint"]


def test_options_reach_the_data_and_oddities_are_reported(
    backbone: Backbone,
    tiny_data: Path,
    tmp_path: Path,
) -> None:
    data = shutil.copytree(tiny_data, tmp_path / "data")
    contents = {
        split: json.loads((data / f"{split}.json").read_text())
        for split in ("train", "val", "test")
    }
    learned = next(iter(contents["train"].values()))
    for name in ("first.png", "second.png"):
        shutil.copyfile(data / learned["file_name"], data / name)
        contents["test"][name] = learned | {"file_name": name, "file_path": name}
    for split, content in contents.items():
        lost = {
            "file_name": "lost.png",
            "file_path": "lost.png",
            "positive": "a lost one",
            "class_name": "square",
        }
        # 31 tokens are too many for four prompts in a context of 32
        content |= {
            "square_98": next(iter(content.values())) | {"positive": "a " * 29},
            "square_99": lost,
        }
        write_json(tmp_path / "annotations" / f"{split}.json", content)
    messages: list[str] = []

    def run(**given: Any) -> dict[str, Any]:
        out = tmp_path / "out"
        return compare(
            backbone,
            tmp_path / "annotations",
            ["clip", "coop"],
            1,
            out,
            ONCE,
            images=data,
            on_message=messages.append,
            **given,
        )

    with pytest.raises(DataError, match=r"1 of \d+ images are not in .*: lost\.png"):
        run()
    with pytest.raises(DataError, match=r"the taxonomy .*gone\.json cannot be read"):
        run(skip_broken=True, taxonomy=tmp_path / "gone.json")
    cleaning = run(skip_broken=True, loss="image-to-text")["cleaning"]
    assert cleaning["train"]["images missing, left out"] == 1
    assert cleaning["train"]["captions cut to the 28 tokens that fit"] == 1
    assert (
        "Only the image-to-text contrastive loss is used."
        in (tmp_path / "out" / "results.md").read_text()
    )
    names = json.loads((tmp_path / "out" / "cleaning.json").read_text())["test"][
        "names"
    ]
    copies = "copies of images of train, so test measures nothing new on them"
    assert names[copies] == ["first.png", "second.png"]
    assert names[
        "images with a copy in the same split, which counts as a wrong answer"
    ] == ["first.png", "second.png"]
    assert any("copies of images of train" in message for message in messages)
    (data / contents["test"]["square_98"]["file_name"]).write_bytes(b"hi")
    with pytest.raises(
        DataError, match=r"test: .*; replace the image, or leave it out with"
    ):
        compare(backbone, data, ["coop"], 1, tmp_path / "broken", QUICK)
    assert not (tmp_path / "broken" / "runs").exists(), "told before training"


def test_finished_run_is_not_repeated(
    compared: Compared,
    backbone: Backbone,
    tiny_data: Path,
    tmp_path: Path,
) -> None:
    results = compared[1]
    # later tests read the tables of the whole comparison
    out = Path(shutil.copytree(compared[0], tmp_path / "out"))
    messages: list[str] = []
    again = compare(
        backbone,
        tiny_data,
        METHODS,
        2,
        out,
        QUICK,
        on_message=messages.append,
    )
    assert trainings(messages) == []
    assert again == results
    compare(
        backbone,
        tiny_data,
        [*METHODS, "coop"],
        1,
        out,
        QUICK,
        on_message=messages.append,
    )
    # one method more, one run more
    assert trainings(messages) == ["coop, seed 0, learning rate 0.002"]
    elsewhere = compare(backbone, tiny_data, ["dcar"], 1, tmp_path / "elsewhere", QUICK)
    first, second = (
        found["methods"]["dcar"]["runs"][0] for found in (results, elsewhere)
    )
    # by its seed
    assert first["fingerprint"] == second["fingerprint"]
    assert first["test"] == second["test"]
    compare(
        backbone,
        tiny_data,
        ["coop"],
        1,
        out,
        ONCE,
        on_message=messages.append,
    )
    assert len(trainings(messages)) == 2  # other settings are another run
    assert len(list((out / "runs" / "coop").iterdir())) == 2


def test_another_configuration_of_a_method_is_another_run(
    backbone: Backbone,
    tiny_data: Path,
    tmp_path: Path,
) -> None:
    splits = {
        split: Annotations(tiny_data).load(split)[0]
        for split in ("train", "val", "test")
    }
    runs = MethodRunner(backbone, splits, tmp_path, QUICK, FeatureCache(None, backbone))
    coop = find_method("coop").config
    shorter = replace(coop, prompt=PromptConfig(length=2, image=False))
    one_way = coop.with_loss_direction("image-to-text")
    held = replace(coop, loss=replace(coop.loss, anchor=0.5))
    assert (
        len(
            {
                runs.directory(config, 0, 1e-3)
                for config in (coop, shorter, one_way, held)
            }
        )
        == 4
    )
    automatic, exact, half = (
        replace(runs, config=replace(QUICK, amp=amp))
        for amp in ("auto", "off", "bfloat16")
    )
    # on a CPU
    assert automatic.directory(coop, 0, 1e-3) == exact.directory(coop, 0, 1e-3)
    assert automatic.directory(coop, 0, 1e-3) != half.directory(coop, 0, 1e-3)


@pytest.mark.slow
def test_tuning_has_equal_budgets_and_reads_validation_only(
    backbone: Backbone,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    messages = list[str]()
    starts = dict[str, list[torch.Tensor]]()

    def noted(
        model: DCAR,
        training: Dataset,
        validation: Dataset,
        *given: Any,
        **more: Any,
    ) -> TrainResult:
        assert training.split == "train"
        assert validation.split == "val"
        weights = [p.detach().flatten() for _, p in model.trainables()]
        starts.setdefault(model.config.method, []).append(torch.cat(weights))
        return train(model, training, validation, *given, **more)

    monkeypatch.setattr("dcar_core.evaluation.method_runner.train", noted)
    grid = (1e-4, 1e-2, 1e30)
    names = ["maple", "clip-adapter"]
    results = compare(
        backbone,
        tiny_data,
        names,
        2,
        tmp_path,
        QUICK,
        grid=grid,
        on_message=messages.append,
    )
    # the tuned run of seed 0 is reused
    assert len(trainings(messages)) == 2 * (len(grid) + 1)
    assert not list(tmp_path.rglob("state.pt"))  # finished runs leave no state
    for name in names:
        *tuned, second = starts[name]
        assert all(torch.equal(tuned[0], other) for other in tuned), (
            "every rate starts from the same weights"
        )
        assert not torch.equal(tuned[0], second), "another seed starts from others"
        found = results["methods"][name]
        scores = {
            lr: score for lr, score in found["tuning"].items() if score is not None
        }
        assert set(found["tuning"]) == {"0.0001", "0.01", "1e+30"}
        assert scores[f"{found['lr']:g}"] == max(scores.values())
        # runs with other rates never read the test split
        tested = {
            path.parent.name for path in (tmp_path / "runs" / name).rglob("test.json")
        }
        assert tested == {Path(run["run"]).name for run in found["runs"]}
    assert results["methods"]["clip-adapter"]["tuning"]["1e+30"] is None


def test_a_diverged_method_leaves_the_others_in_the_table(
    backbone: Backbone,
    tiny_data: Path,
    tmp_path: Path,
) -> None:
    wild = replace(QUICK, lr=1e30, epochs=1)
    messages = list[str]()
    results = compare(
        backbone,
        tiny_data,
        ["clip", "clip-adapter"],
        1,
        tmp_path,
        wild,
        on_message=messages.append,
    )
    assert list(results["methods"]) == ["clip"]
    assert "lower --lr" in results["diverged"]["clip-adapter"]
    assert messages[-1].startswith("clip-adapter is left out: ")
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert "| clip-adapter | diverged |" in (tmp_path / "results.md").read_text()
    assert "clip-adapter is left out: " in (tmp_path / "results.md").read_text()
    with pytest.raises(DivergedError, match="lower --lr"):
        compare(backbone, tiny_data, ["clip-adapter"], 1, tmp_path, wild)


@needs("plots")
def test_the_plot_shows_every_method(
    compared: Compared,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    out, results = compared
    assert "![Recall of each method](recall.svg)" in (out / "results.md").read_text()
    drawn = (out / "recall.svg").read_text()
    for text in (
        *results["methods"],
        "Text-to-image R@1, R@5, R@10",
        "Image-to-text R@1, R@5, R@10",
    ):
        assert drawn.count(f">{text}</text>") == 1
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert install_command("plots") in plot_recall(results, tmp_path / "recall.svg")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("dear", "cheap", "advice"),
    [
        (
            40,
            0,
            (
                "Take dear: it is better than the untouched model, by +40.0 points of"
                " mean R@1 among 100 test images"
            ),
        ),
        (
            41,
            40,
            (
                "Take cheap, which costs less: dear is not certainly better, by +1.0"
                " points"
            ),
        ),
        (
            1,
            0,
            "Take the untouched model: dear is not certainly better, by +1.0 points",
        ),
    ],
)
def test_the_cheapest_method_that_is_not_certainly_worse_is_recommended(
    dear: int,
    cheap: int,
    advice: str,
) -> None:
    methods = dict[str, Any]()
    scores = dict[str, list[Scores]]()
    for name, right, size in (
        ("dear", dear, 9),
        ("cheap", cheap, 3),
        ("clip", 0, 0),
    ):
        scores[name] = [
            Scores(np.ones((2, 100)), np.array([np.arange(100) < right] * 2, float))
        ]
        runs = [{"seconds": 1, "val": {"t2i_r1": size, "i2t_r1": size}}]
        methods[name] = {
            "serving": {"bytes": size, "gallery": "unchanged"},
            "runs": runs,
        }
    results: dict[str, Any] = {"methods": methods}
    add_significance(results, scores)
    assert results["recommendation"].startswith(advice)


def test_weak_categories_are_means_over_seeds_and_those_of_few_pairs_are_left_out() -> (
    None
):
    known = {"pairs": 3, "t2i_r1": 90.0, "i2t_r1": 80.0}
    rare = {"pairs": 2, "t2i_r1": 0.0, "i2t_r1": 0.0}
    weak = (
        {"pairs": 4, "t2i_r1": recall, "i2t_r1": recall + 10} for recall in (20.0, 40.0)
    )
    runs = [
        {"categories": {"known": known, "rare": rare, "weak": of_run}}
        for of_run in weak
    ]
    rows = category_rows({"methods": {"a": {"runs": runs}}}, "a")
    assert rows[1:] == [["weak", "4", "30.0", "40.0"], ["known", "3", "90.0", "80.0"]]


def analysed(
    backbone: Backbone,
    data: Dataset,
    categories: str,
    text: Floats,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, Any]:
    """Analyse the first pairs of a split: one image for each letter of `categories`,
    with unit vectors of their own.
    """
    image = np.eye(len(categories), dtype=np.float32)
    samples = [
        replace(s, category=c) for s, c in zip(data.samples, categories, strict=False)
    ]
    model = seeded_model(backbone, find_method("clip").config, 0)
    data = replace(data, samples=samples)
    negatives = [
        image[-1:],
        image[:0],
        *([image[:1]] if categories == "aab" else [image[:0]] * 2),
    ]
    monkeypatch.setattr(module, "encode_captions", lambda *_: text)
    monkeypatch.setattr(module, "encode_images", lambda *_: image)
    monkeypatch.setattr(module, "encode_negatives", lambda *_: negatives)
    return analyse(model, data, prepare_split(data, model, for_training=False))


def test_analysis_equals_one_by_hand(
    backbone: Backbone,
    training: Dataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two images of one category, and one of another that is the first result for the
    second caption.
    """
    text = np.array(
        [
            [1, 0, 0],
            [0, 0.6, 0.8],
            [0, 0, 1],
        ],
        np.float32,
    )
    found = analysed(backbone, training, "aab", text, monkeypatch)
    assert found["test"]["t2i_r1"] == pytest.approx(200 / 3)
    assert found["hard_negative_accuracy"] == 100  # the second pair has no negatives
    assert found["categories"]["a"] == {"pairs": 2, "t2i_r1": 50.0, "i2t_r1": 100.0}
    assert found["categories"]["b"] == {"pairs": 1, "t2i_r1": 100.0, "i2t_r1": 100.0}
    found = analysed(
        backbone,
        training,
        "baac",
        np.eye(4, dtype=np.float32)[[3, 3, 3, 0]],
        monkeypatch,
    )
    assert {
        name: (of["t2i_r1"], of["i2t_r1"]) for name, of in found["categories"].items()
    } == dict.fromkeys("abc", (0, 0))


@pytest.mark.parametrize("name", ["coop", "dcar"])
def test_hard_negatives_are_encoded_as_queries(
    name: str,
    backbone: Backbone,
    training: Dataset,
) -> None:
    model = seeded_model(backbone, find_method(name).config, 0)
    model.query_weights = "predicted"
    if model.head is not None:
        torch.nn.init.normal_(model.head.linear.weight)
    prepared = prepare_split(training, model, for_training=False)
    found = analyse(model, training, prepared)["hard_negative_accuracy"]
    hits = []
    for sample in training.samples:
        pixels = backbone.preprocess(training.read(sample.image))[None]
        image = model.encode_image(
            torch.from_numpy(backbone.preprocess.standardize(pixels))
        ).detach()
        texts = model.encode_query(
            backbone.tokenize([sample.caption, *sample.negatives], model.prompt_tokens)
        ).detach()
        scores = (texts @ image.T).flatten()
        hits.append(bool(scores[0] > scores[1:].max()))
    assert found == pytest.approx(100 * np.mean(hits))
    others = tuple(f"a thing {n}" for n in range(9))
    many = [
        replace(s, negatives=others + s.negatives, negative_categories=())
        for s in training.samples
    ]
    turned = [replace(s, negatives=s.negatives[::-1]) for s in many]
    accuracies = [
        analyse(model, replace(training, samples=s), prepared) for s in (many, turned)
    ]
    assert (
        accuracies[0]["hard_negative_accuracy"]
        == accuracies[1]["hard_negative_accuracy"]
    )
    bare = [
        replace(sample, negatives=(), negative_categories=())
        for sample in training.samples
    ]
    assert (
        analyse(model, replace(training, samples=bare), prepared)[
            "hard_negative_accuracy"
        ]
        is None
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("clip", ("shared", "unchanged")),
        ("coop", ("shared", "unchanged")),
        ("clip-adapter", ("shared", "recomputed")),
        ("dcar+", ("shared", "encoded again")),
        ("block-adapters", ("shared", "encoded again")),
    ],
)
def test_the_cost_of_serving(
    name: str,
    expected: tuple[str, str],
    backbone: Backbone,
) -> None:
    cost = serving_cost(seeded_model(backbone, find_method(name).config, 0))
    assert (cost["backbone"], cost["gallery"]) == expected
    weights = sum(4 * p.numel() for p in backbone.clip.parameters())
    assert (cost["bytes"] == 0) == (name == "clip")
    assert cost["bytes"] < weights


def verdict(
    adapted: range,
    untouched: range,
    images: int = 100,
    method: str = "dcar+",
) -> Verdict:
    """Return the verdict on models that find these images, and their captions."""
    hits = (
        np.isin(np.arange(images), found).astype(float)
        for found in (adapted, untouched)
    )
    scores = [Scores(np.ones((2, images)), np.array([hit, hit])) for hit in hits]
    return Verdict(
        method,
        Comparison.of(*scores, resamples=500),
        TrainConfig(lr=2e-3, epochs=20),
    )


@pytest.mark.parametrize(
    ("adapted", "untouched", "is_worth_it", "answer"),
    [
        (
            range(75),
            range(50),
            True,
            "Yes: +25.0 points of mean R@1 among 100 validation images (95 % ",
        ),
        (
            range(51),
            range(1, 51),
            True,
            "Uncertain: +1.0 points of mean R@1 among 100 validation images (95 % ",
        ),
        (range(50), range(50), False, "No: the untouched model is at least as good"),
        (range(25), range(50), False, "No: the untouched model is at least as good"),
    ],
)
def test_a_gain_was_worth_it_if_it_is_certain(
    adapted: range,
    untouched: range,
    is_worth_it: bool,
    answer: str,
) -> None:
    found = verdict(adapted, untouched)
    assert found.is_worth_it == is_worth_it
    text = str(found)
    assert f"Was it worth it? {answer}" in text
    assert "100 validation pairs" in text
    assert "adapted (dcar+)" in text or not is_worth_it
    assert "Caveat" not in text
    tips = (
        "Next: --method clip-adapter, --lr 0.0005, --epochs 40 --patience 0, more"
        " training pairs"
    )
    assert (tips in text) == ("Next" in text) == (not is_worth_it)
    # clip-adapter learns no more than these
    for name in ("clip-adapter", "block-adapters"):
        assert (
            "Next: --lr 0.0005" in str(verdict(adapted, untouched, method=name))
        ) == (not is_worth_it)


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (
            60,
            (
                "With `rerank`: R@1 of 60.0 (50.0 to 70.0) text-to-image, +10.0 (+5.0"
                " to +16.0) "
            ),
        ),
        (50, "With `rerank`: no gain on these pairs"),
    ],
)
def test_the_second_stage_has_a_line_of_its_own(found: int, line: str) -> None:
    by_vectors = verdict(range(50), range(0))
    again = str(
        replace(by_vectors, reranked=verdict(range(found), range(50)).comparison)
    )
    assert line in again
    plain = str(by_vectors).splitlines()
    assert [
        each for each in again.splitlines() if not each.startswith("With `rerank`")
    ] == plain


def test_new_categories_are_resampled_whole(
    backbone: Backbone, pairs: tuple[Dataset, Dataset]
) -> None:
    new = [
        replace(sample, category=f"new {row // 3}")
        for row, sample in enumerate(pairs[1].samples)
    ]
    adapted, untouched = (
        seeded_model(backbone, find_method(name).config, 0)
        for name in ("clip-adapter", "clip")
    )
    for val, categories in (
        (pairs[1], None),
        (replace(pairs[1], samples=new), len(new) // 3),
    ):
        splits = {"train": pairs[0], "val": val}
        cache = FeatureCache(None, backbone)
        found = verdict_of(adapted, untouched, splits, cache, TrainConfig())
        assert found.comparison.images == len(new)
        assert found.comparison.resampled == (categories or len(new))
        assert (f"pairs of {categories} categories, resampled whole" in str(found)) == (
            categories is not None
        )


def test_few_validation_pairs_get_a_caveat() -> None:
    found = verdict(range(3), range(0), images=3)
    caveat = (
        "Caveat: 3 validation pairs decide little; each is 33.3 points of R@1. Use at"
        " least 100."
    )
    assert caveat in str(found)
    many_captions = replace(found, comparison=replace(found.comparison, queries=900))
    assert caveat.replace("pairs", "images") in str(many_captions), (
        "images are resampled, with all their captions"
    )
