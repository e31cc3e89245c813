"""Train the base CLIP of the emoji example on every style but the two domains.

    python examples/emoji/train_base.py --renders build/renders --out build/base

- A batch has N emoji with one caption and two images each, in different styles. Half of it are groups of four that are
  easily confused: one family with other genders and skin tones, or one subgroup.
- Positives are the images of an emoji, captions that read the same, and tags that are true of another emoji.
  A second contrastive term pulls the two styles of an emoji together, because the domains are unseen styles.
- Images keep their alpha until the batch is made. Background, outline, colour and geometry are random each time.
- Hidden matrices use Muon, the rest AdamW; bf16 autocast. Half of the patches are dropped (FLIP) until the last part.
- Validation emoji of the unseen styles are evaluated for the log; nothing is chosen on them.
- A killed run resumes from its last checkpoint with the same command.
"""

import argparse
import gzip
import json
import math
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from base_batches import SIDE, STYLES, UNSEEN, Sampler, augment, load_images, on_white
from captions import domain_caption, sample_caption, split_of
from safetensors.torch import save_file
from torch import Tensor

MERGES = 8000  # of CLIP's 48,894
CONTEXT = 32
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
SAVE_EVERY, LOG_EVERY = 400, 50  # steps

Views = dict[str, tuple[Tensor, list[str]]]  # style -> images and captions


def write_tokenizer(out: Path) -> open_clip.SimpleTokenizer:
    """Write CLIP's vocabulary cut to its most frequent merges, which saves two thirds of the parameters."""
    packed_lines = Path(open_clip.tokenizer.default_bpe()).read_bytes()
    lines = gzip.decompress(packed_lines).decode().split("\n")[: MERGES + 1]
    with (out / "bpe.txt.gz").open("wb") as file, gzip.GzipFile(fileobj=file, mode="wb", mtime=0) as packed:
        packed.write("\n".join(lines).encode())
    return open_clip.SimpleTokenizer(bpe_path=str(out / "bpe.txt.gz"), context_length=CONTEXT)


def build_model() -> open_clip.CLIP:
    """Return a model with random weights that drops half of the patches."""
    text = {key: value for key, value in MODEL["text_cfg"].items() if key != "tokenizer_kwargs"}
    model = open_clip.CLIP(MODEL["embed_dim"], dict(MODEL["vision_cfg"]), text).train()
    model.visual.patch_dropout = open_clip.transformer.PatchDropout(0.5)
    return model


def build_optimizers(model: open_clip.CLIP, kind: str, lr: float) -> list[torch.optim.Optimizer]:
    """Return Muon for hidden matrices and AdamW for the rest, or AdamW for everything."""
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "resblocks" in name]
    rest = [p for name, p in model.named_parameters() if not (p.ndim == 2 and "resblocks" in name)]
    if kind == "adamw":
        return [torch.optim.AdamW(hidden + rest, lr=lr / 2, weight_decay=0.1, betas=(0.9, 0.98))]
    return [
        torch.optim.Muon(hidden, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr / 2, weight_decay=0.01, betas=(0.9, 0.98)),
    ]


def contrastive(images: Tensor, texts: Tensor, positives: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE with several positives, bool (images, texts)."""
    logits = scale * images @ texts.T
    target = positives.float()
    rows = -(logits.log_softmax(1) * target / target.sum(1, keepdim=True)).sum(1).mean()
    columns = -(logits.log_softmax(0) * target / target.sum(0, keepdim=True)).sum(0).mean()
    return (rows + columns) / 2


def batch_loss(
    model: open_clip.CLIP, tokenizer: open_clip.SimpleTokenizer, sampler: Sampler, images: np.ndarray, n: int
) -> tuple[Tensor, Tensor]:
    """Draw a batch of n emoji; return its loss and the model's scale."""
    names, first_rows, second_rows = sampler.draw(n)
    captions = [sample_caption(sampler.emoji[name], sampler.rng) for name in names]
    texts = [text.lower() for text, _ in captions]
    tokens = tokenizer(texts)
    tokens = tokens[:, : int(tokens.argmax(1).max()) + 1]
    rgba = torch.from_numpy(images[np.array(first_rows + second_rows)]).float().div_(255)
    pixels = augment(rgba, torch.tensor([sampler.may_flip[name] for name in names] * 2))
    with torch.autocast("cpu", torch.bfloat16):
        image = model.encode_image(pixels, normalize=True).float()
        length = tokens.shape[1]
        x = model.token_embedding(tokens) + model.positional_embedding[:length]
        x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
        text = F.normalize(x[torch.arange(n), tokens.argmax(1)] @ model.text_projection, dim=-1).float()
    identical = [[a == b for b in texts] for a in texts]
    is_true = [[needs is not None and needs <= sampler.facts[name] for _, needs in captions] for name in names]
    own = torch.eye(n, dtype=torch.bool)
    positives = torch.tensor(identical) | torch.tensor(is_true) | own
    scale = model.logit_scale.exp().clamp(max=100)
    loss = contrastive(image, text, torch.cat([positives, positives]), scale)
    return loss + 0.3 * contrastive(image[:n], image[n:], own, scale.detach().clamp(max=20)), scale


def validation_views(renders: Path, emoji: dict) -> Views:
    """Return the base validation emoji of each unseen style."""
    images, rows = load_images(renders, UNSEEN)
    views, half = {}, len(rows) // 2
    for offset, style in ((0, "twemoji"), (half, "openmoji")):
        chosen = [
            row
            for row in range(offset, offset + half)
            if split_of(rows[row]) == "val" and emoji[rows[row]]["base"] == rows[row]
        ]
        views[style] = (on_white(images[chosen]), [domain_caption(emoji[rows[row]]) for row in chosen])
    return views


@torch.inference_mode()
def validate(model: open_clip.CLIP, tokenizer: open_clip.SimpleTokenizer, views: Views) -> dict[str, list[float]]:
    """Return text-to-image recall at 1, 5 and 10 of each view, in percent."""
    model.eval()
    recalls = {}
    for style, (pixels, captions) in views.items():
        images = torch.cat([model.encode_image(part, normalize=True) for part in pixels.split(256)])
        texts = torch.cat(
            [model.encode_text(tokenizer(captions[i : i + 256]), normalize=True) for i in range(0, len(captions), 256)]
        )
        scores = texts @ images.T
        rank = (scores >= scores.diagonal()[:, None]).sum(1)
        recalls[style] = [round(100 * (rank <= k).float().mean().item(), 1) for k in (1, 5, 10)]
    model.train()
    return recalls


def save_model(model: open_clip.CLIP, out: Path) -> None:
    """Write weights in half precision and the configuration from which open_clip rebuilds the model."""
    weights = {name: value.detach().half().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, str(out / "open_clip_model.safetensors"), metadata={"format": "pt"})
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "squash", "size": [SIDE, SIDE]}
    config = {"model_cfg": MODEL, "preprocess_cfg": preprocess}
    (out / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")


def save_state(model: open_clip.CLIP, optimizers: list[torch.optim.Optimizer], step: int, path: Path) -> None:
    """Replace the checkpoint from which a killed run resumes."""
    part = path.with_suffix(".part")
    state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step}
    torch.save(state, part)
    part.replace(path)


def load_state(model: open_clip.CLIP, optimizers: list[torch.optim.Optimizer], path: Path) -> int:
    """Restore model and optimizers in place; return the number of finished steps, 0 without a checkpoint."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    print(f"resuming from step {state['step']}", flush=True)
    return int(state["step"])


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--renders", type=Path, required=True, help="output of render.mjs")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5200)
    parser.add_argument("--full", type=float, default=0.1, help="share of the steps, at the end, with all patches")
    parser.add_argument("--emoji", type=int, default=128, help="emoji in a batch; twice as many images")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="default: one for each core")
    parser.add_argument("--stop-after", type=int, help="stop at this step of the schedule (for trials)")
    return parser.parse_args()


def main() -> None:
    """Train, log and save."""
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    emoji = json.loads((args.renders / "emoji.json").read_text())
    images, rows = load_images(args.renders, STYLES)
    views = validation_views(args.renders, emoji)
    tokenizer = write_tokenizer(args.out)
    model = build_model()
    optimizers = build_optimizers(model, args.optimizer, args.lr)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    state_file = args.out / "resume.pt"
    step = first_step = load_state(model, optimizers, state_file)
    sampler = Sampler(rows, emoji, args.seed + step)
    started, losses = time.time(), []
    while step < (args.stop_after or args.steps):
        if step >= args.steps * (1 - args.full):
            model.visual.patch_dropout.prob = 0.0
        factor = min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * factor
        loss, scale = batch_loss(model, tokenizer, sampler, images, args.emoji)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
        step += 1
        if step % LOG_EVERY == 0:
            rate = (step - first_step) / (time.time() - started)
            record = {
                "step": step,
                "loss": round(sum(losses) / len(losses), 3),
                "scale": round(scale.item(), 1),
                "pictures_per_s": round(rate * 2 * args.emoji),
                "minutes": round((time.time() - started) / 60, 1),
                "minutes_left": round((args.steps - step) / rate / 60),
            }
            losses = []
            if step % SAVE_EVERY == 0 or step == args.steps:
                record |= validate(model, tokenizer, views)
                save_state(model, optimizers, step, state_file)
                save_model(model, args.out)
            print(json.dumps(record), flush=True)
            with (args.out / "log.jsonl").open("a") as log:
                log.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
