"""Adapt the base model to both domains: the checkpoints and figures of the model card.

    python examples/emoji/train_domains.py
    python examples/emoji/train_domains.py --domains openmoji --seeds 1
    python examples/emoji/train_domains.py --measure
        # the bundled checkpoints, without any training

- For each domain: zero-shot, then the method with three seeds. Validation emoji choose
  the best epoch of a run and the seed whose checkpoint is bundled; test emoji are read
  after the training of each run.
- Figures are given for all test images, and for the base emoji alone (without skin
  tones), each with its own gallery.
- A finished run is not repeated, unless the base model, the data or the settings
  changed. `dcar evaluate` with these settings shares its runs: give its --out as
  --work/DOMAIN.
"""

import argparse
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from dcar_core.data import SPLITS, Annotations, Dataset
from dcar_core.evaluation import summarise
from dcar_core.evaluation.method_runner import MethodRunner
from dcar_core.evaluation.tables import COLUMNS
from dcar_core.model.backbone import BackboneSource, load_backbone
from dcar_core.model.checkpoint import load_checkpoint
from dcar_core.model.config import TrainConfig
from dcar_core.model.dcar import DCAR, seeded_model
from dcar_core.model.methods import find_method
from dcar_core.training.prepared_split import FeatureCache, prepare_split
from dcar_core.training.validation import evaluate

HERE = Path(__file__).parent
DOMAINS = ("twemoji", "openmoji")
PARTS = {"all": "all", "base": "base only"}


def adapt(domain: str, args: argparse.Namespace) -> dict[str, object]:
    """Train zero-shot and all seeds, bundle the best checkpoint, and return the
    domain's results.
    """
    backbone = load_backbone(BackboneSource(str(HERE / "base")))
    splits, _ = Annotations(HERE / domain).load_all(SPLITS)
    config = TrainConfig(
        epochs=args.epochs,
        batch_size=args.batch_size,
        patience=5,
        amp="bfloat16",
    )
    cache = FeatureCache(args.work / domain / "features", backbone)
    runner = MethodRunner(backbone, splits, args.work / domain, config, cache)
    runs = []
    for name, seeds in (("clip", 1), (args.method, args.seeds)):
        for seed in range(seeds):
            run = runner.train(find_method(name).config, seed, args.lr)
            model, _ = load_checkpoint(
                runner.directory(find_method(name).config, seed, args.lr),
                backbone=backbone,
            )
            run |= {"method": name, "test": test_recall(model, domain, splits)}
            runs.append(run)
    adapted = [run for run in runs if run["method"] == args.method]
    best = max(adapted, key=lambda run: run["val"]["t2i_r1"] + run["val"]["i2t_r1"])
    bundle(
        runner.directory(find_method(args.method).config, best["seed"], args.lr),
        HERE / domain / "checkpoint",
    )
    return {
        "runs": runs,
        "bundled_seed": best["seed"],
        "zero_shot": {part: runs[0]["test"][part] for part in PARTS},
        "adapted": {
            part: summarise([run["test"][part] for run in adapted]) for part in PARTS
        },
    }


def test_recall(
    model: DCAR,
    domain: str,
    splits: Mapping[str, Dataset],
) -> dict[str, dict[str, float]]:
    """Return recall on all test images, and on the base emoji alone."""
    test = splits["test"]
    rows = map(json.loads, (HERE / domain / "metadata.jsonl").read_text().splitlines())
    base = {row["file_name"] for row in rows if row["base"]}
    parts = (
        test,
        replace(test, samples=[each for each in test.samples if each.image in base]),
    )
    found = (
        evaluate(model, prepare_split(part, model, for_training=False))
        for part in parts
    )
    return dict(zip(PARTS, found, strict=True))


def measure(domain: str) -> None:
    """Print R@1 in percent of the base model and of the bundled checkpoint."""
    backbone = load_backbone(BackboneSource(str(HERE / "base")))
    splits, _ = Annotations(HERE / domain).load_all(SPLITS)
    adapted, _ = load_checkpoint(HERE / domain / "checkpoint", backbone=backbone)
    for name, model in {
        "zero-shot": seeded_model(backbone, find_method("clip").config, 0),
        "bundled": adapted,
    }.items():
        for part, recall in test_recall(model, domain, splits).items():
            print(
                f"| {domain}, {PARTS[part]} | {name} | {recall['t2i_r1']:.1f} |"
                f" {recall['i2t_r1']:.1f} |"
            )


def bundle(source: Path, target: Path) -> None:
    """Copy a checkpoint and set its backbone to the bundled base model."""
    target.mkdir(exist_ok=True)
    shutil.copyfile(
        source / "trainables.safetensors", target / "trainables.safetensors"
    )
    config = json.loads((source / "config.json").read_text())
    config["backbone"]["model"] = "../../base"
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def card(results: dict[str, dict]) -> str:
    """Return the model card's table."""
    lines = [
        (
            "| style, test emoji | | text-to-image R@1 | R@5 | R@10 | image-to-text R@1"
            " | R@5 | R@10 |"
        ),
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for domain, result in results.items():
        for part in result["adapted"]:
            plain, mean, std = (
                result["zero_shot"][part],
                *(result["adapted"][part][k] for k in ("mean", "std")),
            )
            cells = " | ".join(f"{plain[c]:.1f}" for c in COLUMNS)
            lines.append(f"| {domain}, {PARTS[part]} | zero-shot | {cells} |")
            cells = " | ".join(f"{mean[c]:.1f} ± {std[c]:.1f}" for c in COLUMNS)
            lines.append(f"| | adapted | {cells} |")
    return "\n".join(lines)


def main() -> None:
    """Adapt the given domains, update results.json and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--domains",
        nargs="+",
        choices=DOMAINS,
        default=DOMAINS,
        help="default: both",
    )
    parser.add_argument(
        "--method",
        default="query-prompts",
        help="default: %(default)s",
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument(
        "--work",
        type=Path,
        default=HERE / "build" / "domains",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="print R@1 of the bundled checkpoints, and train nothing",
    )
    args = parser.parse_args()
    if args.measure:
        for domain in args.domains:
            measure(domain)
        return
    file = HERE / "results.json"
    for domain in args.domains:
        result = adapt(domain, args)
        # read after the training: another process may have written its domain
        results = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps(results | {domain: result}, indent=1) + "\n")
    print(card(json.loads(file.read_text())))


if __name__ == "__main__":
    main()
