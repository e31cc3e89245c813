"""Train the base CLIP of the emoji example on every style but the two domains.

    python examples/emoji/train_base.py --renders examples/emoji/build/renders --out
    examples/emoji/build/base

- A batch has N emoji with one caption and two images each, in different styles. Half of
  it are groups of four that are easily confused: one family with other genders and skin
  tones, or one subgroup.
- Positives are the images of an emoji, captions that read the same, and tags that are
  true of another emoji. A second contrastive term pulls the two styles of an emoji
  together, because the domains are unseen styles.
- Each step also has phrases with a sentence encoder's ranking of emoji (phrases.py).
  The text tower learns to rank the mean images of emoji as the encoder ranks their
  words, and to predict its vectors with a head that is not kept.
- A share of the captions and phrases has a typing error.
- Images keep their alpha until the batch is made. Background, outline, colour and
  geometry are random each time.
- Hidden matrices use Muon, which PyTorch has since 2.9, the rest AdamW; bf16 autocast.
  Half of the patches are dropped (FLIP) until the last part. The saved weights are a
  moving average.
- Validation emoji and queries on the unseen styles are evaluated for the log; nothing
  is chosen on test emoji.
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
from base_batches import SIDE, STYLES, Sampler, augment, load_images
from base_texts import TEMPERATURE, TextEncoder, Texts
from base_validation import Validation, encode_images
from safetensors.torch import load_file, save_file
from torch import Tensor

MERGES = 8000  # of CLIP's 48,894
CONTEXT = 32
MODEL = {
    "embed_dim": 256,
    "vision_cfg": {
        "image_size": SIDE,
        "layers": 6,
        "width": 192,
        "head_width": 64,
        "patch_size": 8,
    },
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
# steps
SAVE_EVERY = 400
LOG_EVERY = 50
AVERAGE = 0.997  # of the weights, per step


def write_tokenizer(out: Path) -> open_clip.SimpleTokenizer:
    """Write CLIP's vocabulary cut to its most frequent merges, which saves two thirds
    of the parameters.
    """
    packed_lines = Path(open_clip.tokenizer.default_bpe()).read_bytes()
    lines = gzip.decompress(packed_lines).decode().split("\n")[: MERGES + 1]
    with (
        (out / "bpe.txt.gz").open("wb") as file,
        gzip.GzipFile(fileobj=file, mode="wb", mtime=0) as packed,
    ):
        packed.write("\n".join(lines).encode())
    return open_clip.SimpleTokenizer(
        bpe_path=str(out / "bpe.txt.gz"), context_length=CONTEXT
    )


def build_model() -> open_clip.CLIP:
    """Return a model with random weights that drops half of the patches."""
    text = {
        key: value
        for key, value in MODEL["text_cfg"].items()
        if key != "tokenizer_kwargs"
    }
    model = open_clip.CLIP(MODEL["embed_dim"], dict(MODEL["vision_cfg"]), text).train()
    model.visual.patch_dropout = open_clip.transformer.PatchDropout(0.5)
    return model


def build_optimizers(model: open_clip.CLIP, lr: float) -> list[torch.optim.Optimizer]:
    """Return Muon for hidden matrices and AdamW for the rest."""
    hidden = [
        p for name, p in model.named_parameters() if p.ndim == 2 and "resblocks" in name
    ]
    rest = [
        p
        for name, p in model.named_parameters()
        if not (p.ndim == 2 and "resblocks" in name)
    ]
    return [
        torch.optim.Muon(
            hidden,
            lr=lr,
            weight_decay=0.1,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(rest, lr=lr / 2, weight_decay=0.01, betas=(0.9, 0.98)),
    ]


def contrastive(
    images: Tensor,
    texts: Tensor,
    positives: Tensor,
    scale: Tensor,
) -> Tensor:
    """Symmetric InfoNCE with several positives, bool (images, texts)."""
    logits = scale * images @ texts.T
    target = positives.float()
    rows = -(logits.log_softmax(1) * target / target.sum(1, keepdim=True)).sum(1).mean()
    columns = (
        -(logits.log_softmax(0) * target / target.sum(0, keepdim=True)).sum(0).mean()
    )
    return (rows + columns) / 2


class Trainer:
    """The model with its moving average, and what a step needs."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.step = 0
        self.emoji = json.loads((args.renders / "emoji.json").read_text())
        self.images, rows = load_images(args.renders, STYLES)
        self.sampler = Sampler(rows, self.emoji, args.seed)
        names = sorted(self.sampler.images)
        self.texts = Texts(args.renders, self.emoji, names, self.sampler.rng)
        self.model = build_model()
        self.tokenizer = write_tokenizer(args.out)
        if args.init:
            weights = load_file(args.init / "open_clip_model.safetensors")
            self.model.load_state_dict(
                {name: value.float() for name, value in weights.items()}
            )
        self.encode_texts = TextEncoder(self.model, self.tokenizer)
        self.head = torch.nn.Linear(
            MODEL["text_cfg"]["width"], self.texts.vectors.shape[1]
        )
        self.optimizers = build_optimizers(self.model, args.lr)
        self.optimizers[-1].add_param_group({"params": list(self.head.parameters())})
        self.peaks = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        self.parameters = [*self.model.parameters(), *self.head.parameters()]
        self.average = {
            name: value.detach().clone()
            for name, value in self.model.named_parameters()
        }
        self.owners = torch.tensor([self.texts.places[name] for name, _ in rows])
        # of each emoji's images; see `start_means`
        self.means = torch.empty(0, MODEL["embed_dim"])

    def take_step(self) -> list[float]:
        """Train on one batch; return the terms of its loss."""
        args = self.args
        if self.step >= args.steps * (1 - args.full):
            self.model.visual.patch_dropout.prob = 0.0
        factor = (
            min(1.0, (self.step + 1) / 200)
            * 0.5
            * (1 + math.cos(math.pi * self.step / args.steps))
        )
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.zero_grad(set_to_none=True)
        terms = self.losses()
        (terms @ torch.tensor([1.0, 0.3, 0.2, 0.5, 0.5])).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        weight = 1 - min(AVERAGE, self.step / (self.step + 10))
        for name, value in self.model.named_parameters():
            self.average[name].lerp_(value.detach(), weight)
        return terms.tolist()

    def losses(self) -> Tensor:
        """Draw a batch; return the five terms of its loss.

        They are: images and captions; the two images of an emoji; captions and the mean
        images of all emoji; phrases and the mean images of base emoji; the encoder's
        vectors.
        """
        n = self.args.emoji
        names, first_rows, second_rows = self.sampler.draw(n)
        captions, typed, true = self.texts.captions(names)
        phrases, numbers = self.texts.draw_phrases(self.args.phrases)
        hidden, text = self.encode_texts([*typed, *phrases])
        rgba = (
            torch.from_numpy(self.images[np.array(first_rows + second_rows)])
            .float()
            .div_(255)
        )
        pixels = augment(
            rgba, torch.tensor([self.sampler.may_flip[name] for name in names] * 2)
        )
        with torch.autocast("cpu", torch.bfloat16):
            image = self.model.encode_image(pixels, normalize=True)
        image = image.float()
        places = torch.tensor([self.texts.places[name] for name in names])
        positives = true[:, places].T | torch.tensor(
            [[a == b for b in captions] for a in captions]
        )
        scale = self.model.logit_scale.exp().clamp(max=60)
        pairs = contrastive(image, text[:n], torch.cat([positives, positives]), scale)
        fixed = scale.detach()
        styles = contrastive(
            image[:n],
            image[n:],
            torch.eye(n, dtype=torch.bool),
            fixed.clamp(max=20),
        )
        with torch.no_grad():
            self.means[places] = F.normalize(
                0.6 * self.means[places] + 0.2 * (image[:n] + image[n:]), dim=1
            )
        share = true.float() / true.sum(1, keepdim=True)
        named = (
            -((fixed * text[:n] @ self.means.T).log_softmax(1) * share).sum(1).mean()
        )
        ranking = torch.from_numpy(self.texts.scores[numbers] / TEMPERATURE).softmax(1)
        found = (fixed * text[n:] @ self.means[self.texts.base].T).log_softmax(1)
        rows = torch.from_numpy(self.texts.rows[numbers].astype(np.int64))
        ranked = -(ranking * found.gather(1, rows)).sum(1).mean()
        vectors = torch.from_numpy(self.texts.vectors[numbers].astype(np.float32))
        predicted = 1 - F.cosine_similarity(self.head(hidden[n:]), vectors).mean()
        return torch.stack([pairs, styles, named, ranked, predicted])

    @torch.no_grad()
    def start_means(self) -> None:
        """Encode all images, for the mean image of each emoji."""
        self.model.eval()
        sums = torch.zeros(len(self.texts.places), MODEL["embed_dim"])
        self.means = F.normalize(
            sums.index_add_(0, self.owners, encode_images(self.model, self.images)),
            dim=1,
        )
        self.model.train()

    @torch.no_grad()
    def save(self, validation: Validation) -> dict[str, list[float]]:
        """Write the average as a model and the state as a checkpoint; return validation
        figures of the average.
        """
        weights = {
            name: value.detach().clone()
            for name, value in self.model.named_parameters()
        }
        for name, value in self.model.named_parameters():
            value.copy_(self.average[name])
        self.model.eval()
        figures = validation.measure(self.model, self.encode_texts)
        save_model(self.model, self.args.out)
        for name, value in self.model.named_parameters():
            value.copy_(weights[name])
        self.model.train()
        state = {
            "model": self.model.state_dict(),
            "head": self.head.state_dict(),
            "average": self.average,
            "step": self.step,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        part = self.args.out / "resume.part"
        torch.save(state, part)
        part.replace(self.args.out / "resume.pt")
        return figures

    def resume(self) -> None:
        """Restore the last checkpoint, if there is one."""
        path = self.args.out / "resume.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.head.load_state_dict(state["head"])
        self.average = state["average"]
        self.step = state["step"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.sampler.rng.seed(self.args.seed + self.step)
        print(f"resuming from step {self.step}", flush=True)


def save_model(model: open_clip.CLIP, out: Path) -> None:
    """Write weights in half precision and the configuration from which open_clip
    rebuilds the model.
    """
    weights = {
        name: value.detach().half().contiguous()
        for name, value in model.state_dict().items()
    }
    save_file(
        weights,
        str(out / "open_clip_model.safetensors"),
        metadata={"format": "pt"},
    )
    preprocess = {
        "mean": MEAN,
        "std": STD,
        "interpolation": "bicubic",
        "resize_mode": "squash",
        "size": [SIDE, SIDE],
    }
    config = {"model_cfg": MODEL, "preprocess_cfg": preprocess}
    (out / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--renders",
        type=Path,
        required=True,
        help="output of render.mjs, outlines.py and phrases.py",
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5200)
    parser.add_argument(
        "--full",
        type=float,
        default=0.1,
        help="share of the steps, at the end, with all patches",
    )
    parser.add_argument(
        "--emoji",
        type=int,
        default=128,
        help="emoji in a batch; twice as many images",
    )
    parser.add_argument("--phrases", type=int, default=160, help="phrases in a batch")
    parser.add_argument(
        "--init",
        type=Path,
        help="a model to begin with; default: random weights",
    )
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="default: one for each core")
    return parser.parse_args()


def main() -> None:
    """Train, log and save."""
    args = parse_arguments()
    if not hasattr(torch.optim, "Muon"):
        raise SystemExit(
            f"the optimizer Muon needs PyTorch 2.9 or newer, not {torch.__version__}"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    trainer = Trainer(args)
    validation = Validation(args.renders)
    trainer.resume()
    trainer.start_means()
    first_step = trainer.step
    started = time.time()
    losses = []
    while trainer.step < args.steps:
        losses.append(trainer.take_step())
        step = trainer.step
        if step % LOG_EVERY == 0:
            rate = (step - first_step) / (time.time() - started)
            record = {
                "step": step,
                "losses": [round(float(term), 3) for term in np.mean(losses, axis=0)],
                "pictures_per_s": round(rate * 2 * args.emoji),
                "minutes": round((time.time() - started) / 60, 1),
                "minutes_left": round((args.steps - step) / rate / 60),
            }
            losses = []
            if step % SAVE_EVERY == 0 or step == args.steps:
                record |= trainer.save(validation)
            print(json.dumps(record), flush=True)
            with (args.out / "log.jsonl").open("a") as log:
                log.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
