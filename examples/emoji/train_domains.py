"""Adapt the base model to both domains and measure the gain: the checkpoints and figures of the model card.

    python examples/emoji/train_domains.py --domains twemoji
    python examples/emoji/train_domains.py --domains openmoji --epochs 16 --short 1 --anchor 3

- Each domain runs zero-shot, then the method with three seeds.
- The best epoch of a run and the seed of the bundled checkpoint are chosen on the validation emoji; the test emoji are
  read once per run.
- Figures are for all test images and for the base emoji alone (without skin tones), each searched among its own images.
- A finished run is not repeated; `--restart` discards finished runs.
"""

import argparse
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

from captions import TONES, facts, short_caption

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
    base = {row["file_name"] for row in map(json.loads, metadata(domain)) if row["base"]}
    return replace(data, samples=[sample for sample in data.samples if sample.image in base])


def with_short_captions(data: Dataset, domain: str, count: int) -> Dataset:
    """Add `count` short captions of one or two tags to each caption, since people search for "birthday".

    A short caption is true of several images; their attributes list it, so training never treats it as a negative.
    """
    rng = random.Random(0)
    known = {row["file_name"]: emoji_of(row) for row in map(json.loads, metadata(domain))}
    short = [[short_caption(known[sample.image], rng) for _ in range(count)] for sample in data.samples]
    needed = {text: need for each in short for text, need in each}
    samples = []
    for sample, each in zip(data.samples, short, strict=True):
        true = facts(known[sample.image])
        sample = replace(sample, attributes=tuple(text for text, need in needed.items() if need <= true))
        further = replace(sample, negatives=(), negative_categories=())
        samples += [sample, *(replace(further, caption=text) for text, _ in each)]
    return replace(data, samples=samples)


def emoji_of(row: dict) -> dict:
    """Return a line of metadata.jsonl in the form that `captions` takes."""
    numbers = {f"{name} skin tone": number for number, name in TONES.items()}
    tones = [numbers[attribute] for attribute in row["attributes"] if attribute in numbers]
    tags = [attribute for attribute in row["attributes"] if attribute not in numbers]
    return {"label": row["category"], "tags": tags, "tones": tones}


def metadata(domain: str) -> list[str]:
    return (HERE / domain / "metadata.jsonl").read_text().splitlines()


def test_recall(model: DCAR, domain: str) -> dict[str, dict[str, float]]:
    data = load_split(HERE / domain, "test")[0]
    parts = {"all": data, "base": base_only(data, domain)}
    return {name: evaluate(model, prepare_split(part, model, for_training=False)) for name, part in parts.items()}


def adapt(domain: str, args: argparse.Namespace) -> dict[str, object]:
    work = args.work / domain
    backbone = load_backbone(BackboneSource(str(HERE / "base")))
    training = with_short_captions(load_split(HERE / domain, "train")[0], domain, args.short)
    validation = load_split(HERE / domain, "val")[0]
    settings = f"{args.epochs}-{args.batch_size}-{args.lr:g}-{args.short}-{args.anchor}"
    runs = []
    for name, seeds in (("clip", 1), (args.method, args.seeds)):
        for seed in range(seeds):
            done = work / f"{name}-{seed}-{settings}" / "run.json"
            if not done.is_file():
                config = TrainConfig(epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, seed=seed)
                chosen = method(name)
                if name != "clip" and args.anchor is not None:
                    chosen = replace(chosen, loss=replace(chosen.loss, anchor=args.anchor))
                model = seeded_model(backbone, chosen, seed)
                found = train(model, training, validation, config)
                notes = {**config.to_dict(), "epoch": found.epoch, "validation": found.best}
                save_checkpoint(model, done.parent, training=notes)
                run = {
                    "method": name,
                    "seed": seed,
                    "epoch": found.epoch,
                    "seconds": round(found.seconds),
                    "query": model.config.reweight.query,
                    "val": found.best,
                    "test": test_recall(model, domain),
                }
                done.write_text(json.dumps(run) + "\n")
            runs.append(json.loads(done.read_text()))
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
    """Copy a checkpoint and point it to the base model next to it."""
    target.mkdir(exist_ok=True)
    shutil.copyfile(source / "trainables.safetensors", target / "trainables.safetensors")
    config = json.loads((source / "config.json").read_text())
    config["backbone"]["model"] = "../../base"
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def card(results: dict[str, dict]) -> str:
    lines = ["| style, test emoji | | text-to-image R@1 | R@5 | R@10 | image-to-text R@1 | R@5 | R@10 |",
             "| --- | --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for domain, found in results.items():
        for part, words in (("all", "all"), ("base", "base only")):
            plain, mean, std = found["zero_shot"][part], *(found["adapted"][part][k] for k in ("mean", "std"))
            lines.append(f"| {domain}, {words} | zero-shot | " + " | ".join(f"{plain[c]:.1f}" for c in COLUMNS) + " |")
            cells = " | ".join(f"{mean[c]:.1f} ± {std[c]:.1f}" for c in COLUMNS)
            lines.append(f"| | adapted | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, default=DOMAINS, help="some of them; default: all")
    parser.add_argument("--method", default="dcar+", help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--short", type=int, default=0, help="short captions per caption; default: %(default)s")
    parser.add_argument("--anchor", type=float, help="weight of the loss that holds features near CLIP's; default: the "
                        "method's")  # fmt: skip
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
