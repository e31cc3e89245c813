"""Measure models of several families with random weights: rates, memory and start in each runtime; or their equality.

    python benchmarks/models.py [--models ViT-B-32,MobileCLIP2-S0] [--runtimes torch,openvino,openvino-bf16]
    python benchmarks/models.py --equality    # towers against open_clip's own encoders, at real size

- Each row is measured in a process of its own, at its second start, with one thread. Rates are the better of two, per
  second of CPU time, so that other work on the machine shows little.
- Captions and images are those of `runtimes.py`. Random weights say nothing about ranking.
- Vocabularies of the hub are replaced by one of the captions' words, about a token a word; embedding tables keep their
  size.
- start: seconds of CPU time until the first text is encoded. memory: peak of the process.
"""

import argparse
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import open_clip
import torch
from runtimes import catalogue
from safetensors.torch import save_file
from service import ROOT
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from dcar_core.encoder.runtimes import EXPORTED
from dcar_core.model.backbone import BackboneSource, load_backbone
from dcar_core.model.checkpoint import save_checkpoint
from dcar_core.model.config import MODEL_CONFIG
from dcar_core.model.dcar import seeded_model
from dcar_core.model.methods.registry import default_method, method
from dcar_core.model.text.tokenizer import TextLayout
from dcar_core.model.towers.select import select_towers
from dcar_core.util import machine

MODELS = ("ViT-B-32", "MobileCLIP2-S0", "ViT-B-16-SigLIP2", "PE-Core-T-16-384", "xlm-roberta-base-ViT-B-32")
RUNTIMES = ("torch", "openvino", "openvino-bf16")
EQUAL = (
    "ViT-B-16-SigLIP", "ViT-B-16-SigLIP2", "PE-Core-B-16", "PE-Core-T-16-384", "EVA02-B-16", "ViTamin-S",
    "coca_ViT-B-32", "MobileCLIP2-S0",
)  # fmt: skip
_MEASURE = """
import json, sys, time
from pathlib import Path
from dcar_core import Encoder
checkpoint, runtime, cache, data, count = sys.argv[1:]
encoder = Encoder.load(checkpoint, device="cpu", runtime=runtime, cache=Path(cache), threads=1)
encoder.encode_text(["a red car"])
result = {"start": time.process_time(), "has_torch": "torch" in sys.modules}
rows = [json.loads(line) for line in (Path(data) / "pairs.jsonl").read_text().splitlines()][: int(count)]
texts, pixels = [row["caption"] for row in rows], [encoder.preprocess(Path(data) / row["image"]) for row in rows]

def cpu_seconds(run):
    run()
    times = []
    for _ in range(2):
        begun = time.process_time()
        run()
        times.append(time.process_time() - begun)
    return min(times)

import numpy as np
batch = np.stack(pixels[:8])
result["text"] = cpu_seconds(lambda: [encoder.encode_text([text]) for text in texts[:8]]) / 8
result["texts"] = len(texts) / cpu_seconds(lambda: encoder.encode_text(texts))
result["images"] = 8 / cpu_seconds(lambda: encoder.encode_pixels(batch))
status = Path("/proc/self/status").read_text()  # getrusage would include the parent's memory at the fork
result["memory"] = int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6
print(json.dumps(result))
"""


def random_model(name: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Build a built-in model at its real size with random weights; return it with its configuration."""
    config = open_clip.get_model_config(name)
    towers = {part: dict(config[part]) for part in ("vision_cfg", "text_cfg", "multimodal_cfg") if part in config}
    if encoder := towers["text_cfg"].get("hf_model_name"):
        towers["text_cfg"] |= {"hf_model_name": str(hf_directory(encoder)), "hf_model_pretrained": False}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = open_clip.create_model(name, load_weights=False, **towers)
    return model.eval(), config


def hf_directory(name: str) -> Path:
    """Write the configuration of XLM-RoBERTa's base size, for a machine that cannot reach the hub."""
    path = ROOT / "data" / "benchmarks" / name
    path.mkdir(parents=True, exist_ok=True)
    content = {
        "model_type": "xlm-roberta", "vocab_size": 250002, "hidden_size": 768, "num_hidden_layers": 12,
        "num_attention_heads": 12, "intermediate_size": 3072, "max_position_embeddings": 514, "type_vocab_size": 1,
        "layer_norm_eps": 1e-5, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(content))
    return path


def random_checkpoint(work: Path, name: str, captions: list[str]) -> Path:
    """Return a checkpoint on a random model, by the method that has every part its towers take; made once."""
    checkpoint, base = work / f"{name}-checkpoint", work / f"{name}-base"
    if (checkpoint / "config.json").exists():
        return checkpoint
    base.mkdir(parents=True, exist_ok=True)
    model, config = random_model(name)
    save_file({n: v.clone() for n, v in model.state_dict().items()}, base / "open_clip_model.safetensors")
    text = config["text_cfg"]
    if "hf_tokenizer_name" in text:
        write_tokenizer(base, captions, has_start="hf_model_name" in text)
    if encoder := text.get("hf_model_name"):
        (base / encoder).mkdir(exist_ok=True)
        (base / encoder / "config.json").write_bytes((hf_directory(encoder) / "config.json").read_bytes())
    size, mean, std = config["vision_cfg"]["image_size"], open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    preprocess = {"size": [size, size], "mean": list(mean), "std": list(std)}
    (base / MODEL_CONFIG).write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    del model
    backbone = load_backbone(BackboneSource(str(base)))
    widest = "dcar+" if backbone.level == "full" else default_method(backbone)
    save_checkpoint(seeded_model(backbone, method(widest), 0), checkpoint)
    return checkpoint


def write_tokenizer(directory: Path, captions: list[str], *, has_start: bool) -> None:
    """Write a vocabulary of the captions' words, with start and end of XLM-RoBERTa or with SigLIP 2's end alone."""
    specials = ["<s>", "<pad>", "</s>", "<unk>"] if has_start else ["<pad>", "</s>", "<unk>"]
    words = sorted({f"▁{word}" for caption in captions for word in caption.lower().split()})
    letters = sorted({letter for word in words for letter in word})
    pieces = [(piece, 0.0) for piece in specials] + [(word, -1.0) for word in words]
    pieces += [(letter, -9.0) for letter in letters if letter not in words]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=specials.index("<unk>"), byte_fallback=False))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    template = "<s> $A </s>" if has_start else "$A </s>"
    ends = [(token, specials.index(token)) for token in template.split() if token != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ends)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"pad_token": "<pad>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def measure(name: str, checkpoint: Path, runtime: str, cache: Path, data: Path, count: int) -> str:
    """Start twice where the first start exports; return the Markdown row of the last."""
    if runtime == "openvino-bf16" and (reason := machine.missing_bf16()):
        return f"| {name} | {runtime} | {reason.partition('(')[0].strip()} | | | | |"
    command = [sys.executable, "-c", _MEASURE, str(checkpoint), runtime, str(cache), str(data), str(count)]
    for _ in range(2 if runtime in EXPORTED else 1):
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        if done.returncode:
            return f"| {name} | {runtime} | {done.stderr.strip().splitlines()[-1][:120]} | | | | |"
    found = json.loads(done.stdout.splitlines()[-1])
    start = f"{found['start']:.1f} s{'' if found['has_torch'] else ', without PyTorch'}"
    return (
        f"| {name} | {runtime} | {found['texts']:.0f} | {1000 * found['text']:.0f} ms | {found['images']:.1f} "
        f"| {found['memory']:,.0f} MB | {start} |"
    )


def check_equality(name: str) -> str:
    """Compare a real-size model's towers with its own encoders, bit for bit, and trimmed texts."""
    model, config = random_model(name)
    text_cfg, size = config["text_cfg"], int(config["vision_cfg"]["image_size"])
    context, vocabulary = int(text_cfg.get("context_length", 77)), int(text_cfg["vocab_size"])
    is_hub = "hf_tokenizer_name" in text_cfg
    layout = TextLayout(context, () if is_hub else (vocabulary - 2,), 1 if is_hub else vocabulary - 1, 0)
    text, image = select_towers(model, layout, list(range(1000, 1010)), size)
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in (3, 9, context - 2 - layout.start):
        words = torch.randint(1000, 30_000, (length,), generator=generator).tolist()
        ids = [*layout.start_ids, *words, layout.end_id]
        rows.append(ids + [layout.pad_id] * (context - len(ids)))
    tokens, pixels = torch.tensor(rows), torch.randn(2, 3, size, size, generator=generator)
    with torch.inference_mode():
        stock_text = model.encode_text(tokens, normalize=False)
        stock_image = model.encode_image(pixels, normalize=False)
        is_equal = torch.equal(text.encode(tokens), stock_text) and torch.equal(image.encode(pixels), stock_image)
        short = tokens[:2, : int(text.layout.lengths(tokens[:2]).max())]
        difference = float((text.encode(short) - stock_text[:2]).abs().max() / stock_text.abs().max())
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    level = "full" if image.width else "text"
    return f"| {name} | {millions:,.0f} M | {level} | {'equal' if is_equal else 'DIFFERENT'} | {difference:.0e} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("data/benchmarks"), help="folder of models and images")
    parser.add_argument("--models", help=f"comma-separated; default: {','.join(MODELS)}, or the eight of --equality")
    parser.add_argument("--runtimes", default=",".join(RUNTIMES), help="comma-separated")
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--equality", action="store_true", help="compare towers with open_clip's encoders")
    given = parser.parse_args()
    names = given.models.split(",") if given.models else EQUAL if given.equality else MODELS
    if given.equality:
        print(
            "| model | parameters | level | whole texts and images | trimmed texts |\n| --- | --- | --- | --- | --- |"
        )
        for name in names:
            print(check_equality(name), flush=True)
        return
    data, cache = catalogue(given.work, given.pictures), given.work / "runtimes"
    captions = [json.loads(line)["caption"] for line in (data / "pairs.jsonl").read_text().splitlines()]
    head = "| model | runtime | texts/s | one text | images/s | memory | start |"
    print(head, "|" + " --- |" * 7, sep="\n", flush=True)
    for name in names:
        checkpoint = random_checkpoint(given.work, name, captions)
        for runtime in given.runtimes.split(","):
            print(measure(name, checkpoint, runtime, cache, data, given.pictures), flush=True)


if __name__ == "__main__":
    main()
