"""Seconds from new captions to a published index, by method: training, encoding of the gallery, everything else.

    python benchmarks/method_seconds.py --data examples/emoji/twemoji --model examples/emoji/base --epochs 5

The served version is that of the untouched model. A method that leaves the image tower as it is finds the features of
the gallery and encodes nothing; see `index_jobs.encoding.shards`.
"""

import argparse
import tempfile
import time
from pathlib import Path

from dcar_core.data import Annotations
from dcar_core.evaluation.analysis import serving_cost
from dcar_core.model.backbone import BackboneSource, load_backbone
from dcar_core.model.checkpoint import save_checkpoint
from dcar_core.model.config import TrainConfig
from dcar_core.model.dcar import seeded_model
from dcar_core.model.methods.registry import method
from dcar_core.negatives import add_negatives, backbone_functions
from dcar_core.training.prepared_split import FeatureCache
from dcar_core.training.train import train
from index_jobs.rebuild import rebuild

METHODS = "clip-adapter,coop,dcar,maple,dcar+,block-adapters,query-prompts,promptsrc,prolip,lora,flyp"
HEADINGS = ["method", "training", "images encoded", "rebuild", "training to published", "bytes per domain", "backbone"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="data set, and gallery unless --gallery is given")
    parser.add_argument("--gallery", type=Path, help="what is indexed")
    parser.add_argument("--model", required=True)
    parser.add_argument("--pretrained")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--features", type=Path, help="directory of frozen features, to leave decoding out")
    args = parser.parse_args()

    backbone = load_backbone(BackboneSource(args.model, args.pretrained))
    splits, reports = Annotations(args.data).load_all(("train", "val"))
    splits = add_negatives(splits, reports, backbone_functions(backbone))
    gallery, config = args.gallery or args.data, TrainConfig(epochs=args.epochs)
    print("| " + " | ".join(HEADINGS) + " |\n|" + " --- |" * len(HEADINGS))
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        cache = FeatureCache(args.features or work / "features", backbone)
        untouched = seeded_model(backbone, method("clip"), 0)
        save_checkpoint(untouched, work / "clip")
        for name in args.methods.split(","):
            index, checkpoint = work / f"index-{name}", work / name
            rebuild(gallery, work / "clip", index, progress=False)
            model = seeded_model(backbone, method(name), 0)
            start = time.perf_counter()
            train(model, splits["train"], splits["val"], config, cache=cache)
            trained = time.perf_counter()
            save_checkpoint(model, checkpoint)
            summary = rebuild(gallery, checkpoint, index, force=True, progress=False)
            done, cost = time.perf_counter(), serving_cost(model)
            row = [name, f"{trained - start:.1f} s", f"{summary.encoded:,}", f"{done - trained:.1f} s",
                   f"{done - start:.1f} s", f"{cost['bytes']:,}", cost["backbone"]]  # fmt: skip
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
