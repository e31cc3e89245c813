"""Adapt the base model to both domains: the checkpoints and figures of the model card.

    python examples/emoji/train_domains.py
    python examples/emoji/train_domains.py --domains openmoji --seeds 1

- For each domain: zero-shot, then the method with three seeds. Validation emoji choose the best epoch of a run and the
  seed whose checkpoint is bundled; each run reads the test emoji once.
- Figures are given for all test images and for the base emoji alone (without skin tones), each with its own gallery.
- A finished run is not repeated; `--restart` discards all runs.
"""

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

from dcar_core.data import Dataset, load_split
from dcar_core.evaluation import summarise
from dcar_core.evaluation.tables import COLUMNS
from dcar_core.model.backbone import BackboneSource, load_backbone
from dcar_core.model.checkpoint import save_checkpoint
from dcar_core.model.config import TrainConfig
from dcar_core.model.dcar import DCAR, seeded_model
from dcar_core.model.methods import method
from dcar_core.training.prepared_split import prepare_split
from dcar_core.training.train import train
from dcar_core.training.validation import evaluate

HERE = Path(__file__).parent
DOMAINS = ("twemoji", "openmoji")


def base_only(data: Dataset, domain: str) -> Dataset:
    """Return the pairs of base emoji, without skin tones."""
    base = {row["file_name"] for row in map(json.loads, metadata(domain)) if row["base"]}
    return replace(data, samples=[sample for sample in data.samples if sample.image in base])


def metadata(domain: str) -> list[str]:
    """Return the lines of metadata.jsonl."""
    return (HERE / domain / "metadata.jsonl").read_text().splitlines()


def test_recall(model: DCAR, domain: str) -> dict[str, dict[str, float]]:
    """Return recall on all test images, and on the base emoji alone."""
    data = load_split(HERE / domain, "test")[0]
    parts = {"all": data, "base": base_only(data, domain)}
    return {name: evaluate(model, prepare_split(part, model, for_training=False)) for name, part in parts.items()}


def adapt(domain: str, args: argparse.Namespace) -> dict[str, object]:
    """Train zero-shot and all seeds, bundle the best checkpoint, and return the domain's results."""
    work = args.work / domain
    backbone = load_backbone(BackboneSource(str(HERE / "base")))
    training = load_split(HERE / domain, "train")[0]
    validation = load_split(HERE / domain, "val")[0]
    settings = f"{args.epochs}-{args.batch_size}-{args.lr:g}-{args.anchor}"
    runs = []
    for name, seeds in (("clip", 1), (args.method, args.seeds)):
        for seed in range(seeds):
            record = work / f"{name}-{seed}-{settings}" / "run.json"
            if not record.is_file():
                config = TrainConfig(epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, seed=seed)
                model_config = method(name)
                if name != "clip" and args.anchor is not None:
                    loss = replace(model_config.loss, anchor=args.anchor)
                    model_config = replace(model_config, loss=loss)
                model = seeded_model(backbone, model_config, seed)
                result = train(model, training, validation, config)
                notes = {**config.to_dict(), "epoch": result.epoch, "validation": result.best}
                save_checkpoint(model, record.parent, training=notes)
                run = {
                    "method": name,
                    "seed": seed,
                    "epoch": result.epoch,
                    "seconds": round(result.seconds),
                    "query": model.config.reweight.query,
                    "val": result.best,
                    "test": test_recall(model, domain),
                }
                record.write_text(json.dumps(run) + "\n")
            runs.append(json.loads(record.read_text()))
    adapted = [run for run in runs if run["method"] == args.method]
    best = max(adapted, key=lambda run: run["val"]["t2i_r1"] + run["val"]["i2t_r1"])
    bundle(work / f"{args.method}-{best['seed']}-{settings}", HERE / domain / "checkpoint")
    return {
        "runs": runs,
        "bundled_seed": best["seed"],
        "zero_shot": {part: runs[0]["test"][part] for part in ("all", "base")},
        "adapted": {part: summarise([run["test"][part] for run in adapted]) for part in ("all", "base")},
    }


def bundle(source: Path, target: Path) -> None:
    """Copy a checkpoint and set its backbone to the bundled base model."""
    target.mkdir(exist_ok=True)
    shutil.copyfile(source / "trainables.safetensors", target / "trainables.safetensors")
    config = json.loads((source / "config.json").read_text())
    config["backbone"]["model"] = "../../base"
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def card(results: dict[str, dict]) -> str:
    """Return the model card's table."""
    lines = ["| style, test emoji | | text-to-image R@1 | R@5 | R@10 | image-to-text R@1 | R@5 | R@10 |",
             "| --- | --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for domain, result in results.items():
        for part, label in (("all", "all"), ("base", "base only")):
            plain, mean, std = result["zero_shot"][part], *(result["adapted"][part][k] for k in ("mean", "std"))
            lines.append(f"| {domain}, {label} | zero-shot | " + " | ".join(f"{plain[c]:.1f}" for c in COLUMNS) + " |")
            cells = " | ".join(f"{mean[c]:.1f} ± {std[c]:.1f}" for c in COLUMNS)
            lines.append(f"| | adapted | {cells} |")
    return "\n".join(lines)


def main() -> None:
    """Adapt the given domains, update results.json and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, default=DOMAINS, help="default: both")
    parser.add_argument("--method", default="dcar+", help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--anchor", type=float, help="weight of the anchor loss; default: the method's")
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--work", type=Path, default=HERE / "build" / "domains", help="default: %(default)s")
    parser.add_argument("--restart", action="store_true")
    args = parser.parse_args()
    if args.restart:
        shutil.rmtree(args.work, ignore_errors=True)
    file = HERE / "results.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    results |= {domain: adapt(domain, args) for domain in args.domains}
    file.write_text(json.dumps(results, indent=1) + "\n")
    print(card(results))


if __name__ == "__main__":
    main()
