"""Train the base CLIP of the emoji example on every style but the two downstream domains.

    python examples/emoji/train_base.py --renders build/renders --out build/base

- A batch holds N emoji, one caption each, and two images of each in different styles. Half of the batch comes in fours
  that are hard to distinguish: one family in other genders and skin tones, or one subgroup. Images of one emoji, equal
  captions, and bare tags that are true of another emoji in the batch are positives. A second contrastive term draws the
  two styles of an emoji together, since the domains are styles never seen here.
- Images keep their alpha channel until the batch: background, outline, colour and geometry are randomised each time, on
  the whole batch at once.
- Muon trains the hidden matrices, AdamW the rest; bf16 autocast; half of the patches are dropped (FLIP) until the last
  part of the run.
- Recall on the validation emoji of the unseen styles is logged; nothing is chosen by it.
- An interrupted run continues from the last checkpoint with the same command.
"""

import argparse
import gzip
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from captions import domain_caption, facts, family, sample_caption, split_of
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

STYLES = (
    "noto",
    "fluent-emoji-flat",
    "fluent-emoji",
    "noto-v1",
    "emojione",
    "fxemoji",
    "streamline-emojis",
    "flag",
    "circle-flags",
    "cif",
    "flagpack",
)
UNSEEN = ("twemoji", "openmoji")
MERGES = 8000
SIDE, RENDERED, CONTEXT = 48, 64, 32
MODEL = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": SIDE, "layers": 6, "width": 192, "head_width": 64, "patch_size": 8},
    "text_cfg": {
        "context_length": CONTEXT,
        "vocab_size": 512 + MERGES + 2,
        "width": 192,
        "heads": 3,
        "layers": 4,
        "tokenizer_kwargs": {"bpe_path": "bpe.txt.gz"},
    },
}
MEAN = STD = (0.5, 0.5, 0.5)
# Subgroups whose mirror image means something else.
DIRECTED = {
    "country-flag",
    "subdivision-flag",
    "flag",
    "arrow",
    "alphanum",
    "keycap",
    "punctuation",
    "math",
    "currency",
    "av-symbol",
    "zodiac",
    "time",
    "transport-sign",
    "religion",
    "other-symbol",
    "music",
}
SIDED = ("left", "right", "clockwise", "magnifying")


def write_tokenizer(out: Path) -> open_clip.SimpleTokenizer:
    """Write CLIP's vocabulary cut to its most frequent merges, which saves two thirds of the parameters."""
    packed_lines = Path(open_clip.tokenizer.default_bpe()).read_bytes()
    lines = gzip.decompress(packed_lines).decode().split("\n")[: MERGES + 1]
    with (out / "bpe.txt.gz").open("wb") as file, gzip.GzipFile(fileobj=file, mode="wb", mtime=0) as packed:
        packed.write("\n".join(lines).encode())
    return open_clip.SimpleTokenizer(bpe_path=str(out / "bpe.txt.gz"), context_length=CONTEXT)


def load_images(renders: Path, styles: tuple[str, ...]) -> tuple[np.ndarray, list[str]]:
    """Return all images of the styles, uint8 (n, 4, 64, 64), and the emoji of each. Packed once, then memory-mapped."""
    packed, names = renders / f"packed-{len(styles)}.npy", renders / f"packed-{len(styles)}.json"
    if not names.exists():
        files = [f for style in styles for f in sorted((renders / style).glob("*.png"))]
        array = np.lib.format.open_memmap(packed, "w+", np.uint8, (len(files), 4, RENDERED, RENDERED))
        for row, file in enumerate(files):
            array[row] = np.asarray(Image.open(file).convert("RGBA")).transpose(2, 0, 1)
        array.flush()
        names.write_text(json.dumps([f.stem for f in files]))
    return np.load(packed, mmap_mode="r"), json.loads(names.read_text())


def augment(rgba: Tensor, may_flip: Tensor) -> Tensor:
    """(B, 4, 64, 64) in 0..1 -> (B, 3, 48, 48), normalised, with random changes per image."""
    n = rgba.shape[0]

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(n, *shape).uniform_(low, high)

    angle = uniform(-0.25, 0.25) * (torch.rand(n) < 0.5)
    zoom, aspect = uniform(0.85, 1.35), uniform(-0.12, 0.12).exp()
    flip = torch.where((torch.rand(n) < 0.4) & may_flip, -1.0, 1.0)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = angle.cos() * zoom * aspect * flip, -angle.sin() * zoom
    theta[:, 1, 0], theta[:, 1, 1] = angle.sin() * zoom * flip, angle.cos() * zoom / aspect
    theta[:, :, 2] = uniform(-0.12, 0.12, 2)
    premultiplied = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1)
    x = F.grid_sample(premultiplied, F.affine_grid(theta, [n, 4, SIDE, SIDE], align_corners=False), align_corners=False)
    color, alpha = x[:, :3], x[:, 3:]

    # A dark outline where colour or alpha changes, as in drawn styles.
    edges = torch.cat([color, alpha], 1)
    edges = (F.max_pool2d(edges, 3, 1, 1) + F.max_pool2d(-edges, 3, 1, 1)).amax(1, keepdim=True)
    outlined = (torch.rand(n) < 0.35).float().view(n, 1, 1, 1) * uniform(0.5, 1.0, 1, 1, 1)
    ink = (edges * uniform(1.0, 2.5, 1, 1, 1) - 0.15).clamp(0, 1) * outlined
    color, alpha = color * (1 - ink), torch.maximum(alpha, ink)

    kind = torch.rand(n, 1, 1, 1)
    background = torch.where(kind < 0.65, torch.ones(n, 3, 1, 1), torch.rand(n, 3, 1, 1))
    background = torch.where((kind >= 0.65) & (kind < 0.8), uniform(0.85, 1.0, 1, 1, 1).expand(n, 3, 1, 1), background)
    x = color + background * (1 - alpha)

    gray = x.mean(1, keepdim=True)
    x = gray + (x - gray) * uniform(0.5, 1.5, 1, 1, 1)
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + (x - mean) * uniform(0.7, 1.3, 1, 1, 1) + uniform(-0.12, 0.12, 1, 1, 1)
    x = x + uniform(-0.06, 0.06, 3, 1, 1)
    return (x.clamp(0, 1) - 0.5) / 0.5


def plain(rgba: np.ndarray) -> Tensor:
    """Return images on white at the model's size, as the encoder sees them (n, 3, 48, 48)."""
    x = torch.from_numpy(rgba.astype(np.float32) / 255)
    x = x[:, :3] * x[:, 3:] + 1 - x[:, 3:]
    return (F.interpolate(x, SIDE, mode="bicubic", antialias=True).clamp(0, 1) - 0.5) / 0.5


class Sampler:
    """Draws emoji with two styles each: half of a batch at random, half in fours of one family or subgroup."""

    GROUP = 4

    def __init__(self, rows: list[str], emoji: dict, seed: int) -> None:
        self.images: dict[str, list[int]] = {}
        for row, k in enumerate(rows):
            self.images.setdefault(k, []).append(row)
        self.base = [k for k in self.images if emoji[k]["base"] == k]
        self.families: dict[str, list[str]] = {}
        self.subgroups: dict[str, list[str]] = {}
        for k in self.images:
            self.families.setdefault(family(emoji[k]), []).append(k)
        for k in self.base:
            self.subgroups.setdefault(emoji[k]["subgroup"], []).append(k)
        self.facts = {k: facts(emoji[k]) for k in self.images}
        self.emoji, self.rng = emoji, random.Random(seed)
        self.may_flip = {
            k: emoji[k]["subgroup"] not in DIRECTED and not any(s in emoji[k]["label"] for s in SIDED)
            for k in self.images
        }

    def draw(self, n: int) -> tuple[list[str], list[int], list[int]]:
        chosen = dict.fromkeys(self.rng.sample(self.base, n // 2))
        wide = [members for members in self.families.values() if len(members) >= self.GROUP]
        while len(chosen) < n:
            alike = self.rng.choice(wide)
            if self.rng.random() < 0.5:
                alike = self.subgroups[self.emoji[self.rng.choice(self.base)]["subgroup"]]
            chosen |= dict.fromkeys(self.rng.sample(alike, min(self.GROUP, len(alike))))
        keys = list(chosen)[:n]
        pairs = [self.rng.sample(p, 2) if len(p) > 1 else p * 2 for p in map(self.images.__getitem__, keys)]
        return keys, [a for a, _ in pairs], [b for _, b in pairs]


def contrastive(images: Tensor, texts: Tensor, same: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE with several positives; same: (images, texts) bool."""
    logits = scale * images @ texts.T
    target = same.float()
    rows = -(logits.log_softmax(1) * target / target.sum(1, keepdim=True)).sum(1).mean()
    columns = -(logits.log_softmax(0) * target / target.sum(0, keepdim=True)).sum(0).mean()
    return (rows + columns) / 2


def recall_at(images: Tensor, texts: Tensor, ks: tuple[int, ...] = (1, 5, 10)) -> list[float]:
    scores = texts @ images.T
    rank = (scores >= scores.diagonal()[:, None]).sum(1)
    return [round(100 * (rank <= k).float().mean().item(), 1) for k in ks]


@torch.inference_mode()
def peek(model: open_clip.CLIP, tokenizer: open_clip.SimpleTokenizer, views: dict) -> dict:
    """Return text-to-image recall on the base validation emoji of each unseen style."""
    model.eval()
    found = {}
    for style, (pixels, captions) in views.items():
        images = torch.cat([model.encode_image(part, normalize=True) for part in pixels.split(256)])
        texts = torch.cat(
            [model.encode_text(tokenizer(captions[i : i + 256]), normalize=True) for i in range(0, len(captions), 256)]
        )
        found[style] = recall_at(images, texts)
    model.train()
    return found


def save_base(model: open_clip.CLIP, out: Path) -> None:
    """Write half-precision weights and the config from which open_clip rebuilds the model."""
    weights = {name: value.detach().half().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, str(out / "open_clip_model.safetensors"), metadata={"format": "pt"})
    config = {
        "model_cfg": MODEL,
        "preprocess_cfg": {
            "mean": MEAN,
            "std": STD,
            "interpolation": "bicubic",
            "resize_mode": "squash",
            "size": [SIDE, SIDE],
        },
    }
    (out / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--renders", type=Path, required=True, help="output of render.mjs")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5200)
    parser.add_argument("--full", type=float, default=0.1, help="share of the steps, at the end, with every patch")
    parser.add_argument("--emoji", type=int, default=128, help="emoji in a batch; twice as many images")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="default: one per core")
    parser.add_argument("--stop-after", type=int, help="stop at this step of the schedule (for trials)")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    emoji = json.loads((args.renders / "emoji.json").read_text())
    images, rows = load_images(args.renders, STYLES)
    unseen, unseen_rows = load_images(args.renders, UNSEEN)
    views, half = {}, len(unseen_rows) // 2
    for offset, style in ((0, "twemoji"), (half, "openmoji")):
        chosen = [
            r
            for r in range(offset, offset + half)
            if split_of(unseen_rows[r]) == "val" and emoji[unseen_rows[r]]["base"] == unseen_rows[r]
        ]
        views[style] = (plain(unseen[chosen]), [domain_caption(emoji[unseen_rows[r]]) for r in chosen])

    tokenizer = write_tokenizer(args.out)
    text_cfg = {k: v for k, v in MODEL["text_cfg"].items() if k != "tokenizer_kwargs"}
    model = open_clip.CLIP(MODEL["embed_dim"], dict(MODEL["vision_cfg"]), text_cfg).train()
    model.visual.patch_dropout = open_clip.transformer.PatchDropout(0.5)
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "resblocks" in n]
    rest = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "resblocks" in n)]
    if args.optimizer == "muon":
        optimizers = [
            torch.optim.Muon(hidden, lr=args.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=args.lr / 2, weight_decay=0.01, betas=(0.9, 0.98)),
        ]
    else:
        optimizers = [torch.optim.AdamW(hidden + rest, lr=args.lr / 2, weight_decay=0.1, betas=(0.9, 0.98))]
    peaks = [o.param_groups[0]["lr"] for o in optimizers]

    step, checkpoint = 0, args.out / "resume.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step = state["step"]
        print(f"continuing from step {step}", flush=True)
    sampler = Sampler(rows, emoji, args.seed + step)
    n, started, first, losses = args.emoji, time.time(), step, []
    eye = torch.eye(n, dtype=torch.bool)
    while step < (args.stop_after or args.steps):
        if step >= args.steps * (1 - args.full):
            model.visual.patch_dropout.prob = 0.0
        factor = min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * factor
        keys, first_rows, second_rows = sampler.draw(n)
        captions = [sample_caption(emoji[k], sampler.rng) for k in keys]
        texts = [text.lower() for text, _ in captions]
        tokens = tokenizer(texts)
        tokens = tokens[:, : int(tokens.argmax(1).max()) + 1]
        raw = torch.from_numpy(images[np.array(first_rows + second_rows)]).float().div_(255)
        pixels = augment(raw, torch.tensor([sampler.may_flip[k] for k in keys] * 2))
        with torch.autocast("cpu", torch.bfloat16):
            image = model.encode_image(pixels, normalize=True).float()
            length = tokens.shape[1]
            x = model.token_embedding(tokens) + model.positional_embedding[:length]
            x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
            text = F.normalize(x[torch.arange(n), tokens.argmax(1)] @ model.text_projection, dim=-1).float()
        alike = [[a == b for b in texts] for a in texts]
        true_of = [[need is not None and need <= sampler.facts[k] for _, need in captions] for k in keys]
        same = torch.tensor(alike) | torch.tensor(true_of) | eye
        scale = model.logit_scale.exp().clamp(max=100)
        loss = contrastive(image, text, torch.cat([same, same]), scale)
        loss = loss + 0.3 * contrastive(image[:n], image[n:], eye, scale.detach().clamp(max=20))
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
        step += 1
        if step % 50 == 0:
            rate = (step - first) / (time.time() - started)
            line = {
                "step": step,
                "loss": round(sum(losses) / len(losses), 3),
                "scale": round(scale.item(), 1),
                "pictures_per_s": round(rate * 2 * n),
                "minutes": round((time.time() - started) / 60, 1),
                "minutes_left": round((args.steps - step) / rate / 60),
            }
            losses = []
            if step % 400 == 0 or step == args.steps:
                line |= peek(model, tokenizer, views)
                torch.save(
                    {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step},
                    checkpoint.with_suffix(".part"),
                )
                checkpoint.with_suffix(".part").replace(checkpoint)
                save_base(model, args.out)
            print(json.dumps(line), flush=True)
            with (args.out / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
