"""Train a small CLIP from scratch on the training pairs of data sets, for machines without pretrained weights.

    python benchmarks/small_clip.py --data photos/cars photos/textures --out small-clip
    dcar evaluate --data photos/cars --model small-clip ...

- A few thousand pairs do not make a general CLIP: it ranks far above chance within its own domains only. It serves to
  compare methods that adapt the same frozen model.
- Only training splits are read. A killed run resumes from its last epoch with the same command.
"""

import argparse
import json
import math
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from service import ROOT
from torch import Tensor
from tqdm import tqdm

from dcar_core.data import Annotations, Dataset
from dcar_core.images import open_image
from dcar_core.training.objective import contrastive_loss

MEAN = STD = (0.5, 0.5, 0.5)
VOCABULARY = ROOT / "examples" / "emoji" / "base" / "bpe.txt.gz"  # CLIP's most frequent merges


def model_config(side: int) -> dict:
    """Return the architecture in open_clip's form."""
    return {
        "embed_dim": 256,
        "vision_cfg": {"image_size": side, "layers": 6, "width": 192, "head_width": 64, "patch_size": 8},
        "text_cfg": {
            "context_length": 64,
            "vocab_size": 8514,
            "width": 192,
            "heads": 3,
            "layers": 4,
            "tokenizer_kwargs": {"bpe_path": VOCABULARY.name},
        },
    }


def read_images(data: Dataset, side: int) -> np.ndarray:
    """Return uint8 (N, side, side, 3), squeezed to a square."""

    def read(i: int) -> np.ndarray:
        image = open_image(data.read(data.samples[i].image)).convert("RGB")
        return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))

    with ThreadPoolExecutor(4) as pool:
        return np.stack(list(tqdm(pool.map(read, range(len(data.samples))), "reading", len(data.samples))))


def augment(images: Tensor, side: int) -> Tensor:
    """Crop, mirror and relight at random: uint8 (B, S, S, 3) -> float32 (B, 3, side, side)."""
    n = len(images)
    x = images.permute(0, 3, 1, 2).float() / 255
    zoom = torch.empty(n).uniform_(0.7, 1.0)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = zoom * torch.where(torch.rand(n) < 0.5, -1.0, 1.0)
    theta[:, 1, 1] = zoom
    theta[:, :, 2] = torch.empty(n, 2).uniform_(-1, 1) * (1 - zoom)[:, None]
    x = F.grid_sample(x, F.affine_grid(theta, [n, 3, side, side], align_corners=False), align_corners=False)
    x = (x - 0.5) * torch.empty(n, 1, 1, 1).uniform_(0.7, 1.3) + torch.empty(n, 3, 1, 1).uniform_(-0.1, 0.1)
    return x.clamp(-0.5, 0.5) / 0.5


def save(model: open_clip.CLIP, out: Path, model_cfg: dict, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Write a model directory with weights in half precision. mean, std: of each channel of its images."""
    weights = {name: value.detach().half().contiguous() for name, value in model.state_dict().items()}
    weights_file = out / "open_clip_model.safetensors"
    save_file(weights, str(weights_file), metadata={"format": "pt"})
    weights_file.chmod(0o644)  # safetensors creates files that only their owner can read
    size = [model_cfg["vision_cfg"]["image_size"]] * 2
    shape = {"mean": mean, "std": std, "interpolation": "bicubic", "resize_mode": "squash", "size": size}
    config = {"model_cfg": model_cfg, "preprocess_cfg": shape}
    (out / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copyfile(VOCABULARY, out / VOCABULARY.name)


def load_pairs(directories: list[Path], side: int) -> tuple[Tensor, list[str]]:
    """Return images uint8 (N, S, S, 3), larger than `side` to allow crops, and captions of all training splits."""
    splits = [Annotations(directory).load("train")[0] for directory in directories]
    images = np.concatenate([read_images(split, side + side // 4) for split in splits])
    return torch.from_numpy(images), [sample.caption for split in splits for sample in split.samples]


def build_model(side: int) -> open_clip.CLIP:
    """Return a model with random weights that drops half of the patches (FLIP)."""
    config = model_config(side)
    text = {key: value for key, value in config["text_cfg"].items() if key != "tokenizer_kwargs"}
    model = open_clip.CLIP(config["embed_dim"], config["vision_cfg"], text).train()
    model.visual.patch_dropout = open_clip.transformer.PatchDropout(0.5)
    return model


def batch_loss(model: open_clip.CLIP, images: Tensor, tokens: Tensor, group: Tensor, side: int) -> Tensor:
    """Return the contrastive loss of a batch of images as `load_pairs` returns them.

    group: (B,), equal for captions that read the same.
    """
    tokens = tokens[:, : int(tokens.argmax(1).max()) + 1]
    length = tokens.shape[1]
    with torch.autocast("cpu", torch.bfloat16):
        image = model.encode_image(augment(images, side), normalize=True).float()
        x = model.token_embedding(tokens) + model.positional_embedding[:length]
        x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
        pooled = x[torch.arange(len(tokens)), tokens.argmax(1)] @ model.text_projection
    scale = model.logit_scale.exp().clamp(max=100)
    return contrastive_loss(F.normalize(pooled.float(), dim=-1), image, group[:, None] == group[None], scale)


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="data sets; only training splits are read")
    parser.add_argument(
        "--out", type=Path, required=True, help="model directory, for --model of dcar train and evaluate"
    )
    parser.add_argument("--side", type=int, default=64, help="pixels; default: %(default)s")
    parser.add_argument("--epochs", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=1e-3, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    return parser.parse_args()


def main() -> None:
    """Train, and write the model directory."""
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    images, captions = load_pairs(args.data, args.side)
    tokens = open_clip.SimpleTokenizer(bpe_path=str(VOCABULARY), context_length=64)(captions)
    groups: dict[str, int] = {}
    group = torch.tensor([groups.setdefault(caption.casefold(), len(groups)) for caption in captions])
    model = build_model(args.side)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.1, betas=(0.9, 0.98))

    state_file, first_epoch = args.out / "resume.pt", 0
    identity = {name: str(value) for name, value in vars(args).items() if name != "out"}
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        if state.get("run") != identity:
            sys.exit(
                f"{state_file} belongs to a run with other arguments: {state.get('run')}; delete it to start again"
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first_epoch = state["epoch"]
    batches = math.ceil(len(captions) / args.batch_size)
    total = batches * args.epochs
    bar = tqdm(total=total, initial=first_epoch * batches, desc="training", unit="batch")
    for epoch in range(first_epoch, args.epochs):
        if epoch >= 0.85 * args.epochs:
            model.visual.patch_dropout.prob = 0.0
        losses = []
        order = np.random.default_rng([args.seed, epoch]).permutation(len(captions))
        for rows in np.array_split(order, batches):
            factor = min(1, (bar.n + 1) / 100) * 0.5 * (1 + math.cos(math.pi * bar.n / total))
            optimizer.param_groups[0]["lr"] = args.lr * factor
            loss = batch_loss(model, images[rows], tokens[rows], group[rows], args.side)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            bar.update()
        bar.set_postfix(loss=f"{np.mean(losses):.3f}")
        part = state_file.with_suffix(".part")
        torch.save(
            {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1, "run": identity},
            part,
        )
        part.replace(state_file)
    save(model, args.out, model_config(args.side), MEAN, STD)
    state_file.unlink()


if __name__ == "__main__":
    main()
