"""Every open_clip configuration with few layers and small widths, in memory or as the
model directory of a user.
"""

import copy
import gzip
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import open_clip
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer_hybrid import ConvStem
from timm.models.vitamin import VitCfg, VitConvCfg
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from dcar_core.model.config import MODEL_CONFIG
from dcar_core.model.tokenizer import TextLayout

WIDTH = 32
HEADS = 2
LAYERS = 3
VOCABULARY = 120

_HF_CONFIGS: dict[str, dict[str, Any]] = {
    "roberta": {
        "model_type": "roberta",
        "pad_token_id": 1,
        "eos_token_id": 2,
        "bos_token_id": 0,
    },
    "xlm-roberta": {
        "model_type": "xlm-roberta",
        "pad_token_id": 1,
        "eos_token_id": 2,
        "bos_token_id": 0,
    },
    "mt5": {
        "model_type": "mt5",
        "d_model": WIDTH,
        "d_kv": WIDTH // HEADS,
        "d_ff": 48,
        "num_layers": LAYERS,
        "num_decoder_layers": 1,
        "num_heads": HEADS,
        "pad_token_id": 0,
        "eos_token_id": 1,
    },
    "nllb": {
        "model_type": "m2m_100",
        "d_model": WIDTH,
        "encoder_layers": LAYERS,
        "decoder_layers": 1,
        "encoder_attention_heads": HEADS,
        "decoder_attention_heads": HEADS,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "bos_token_id": 0,
        "scale_embedding": True,
    },
}
_ENCODER = {
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "intermediate_size": 48,
    "max_position_embeddings": 130,
}


@dataclass(frozen=True)
class TinyClip:
    """A shrunk model in eval mode; layout as its tokenizer would give it; size: S."""

    clip: Any
    layout: TextLayout
    size: int

    def tokens(self, *lengths: int) -> torch.Tensor:
        """int64 (B, L): captions of these lengths, padded to the context."""
        generator = torch.Generator().manual_seed(1)
        rows = []
        for length in lengths:
            words = torch.randint(
                5,
                VOCABULARY - 5,
                (length,),
                generator=generator,
            ).tolist()
            ids = [*self.layout.start_ids, *words, self.layout.end_id]
            rows.append(
                ids + [self.layout.pad_id] * (self.layout.context_length - len(ids))
            )
        return torch.tensor(rows)

    def pixels(self, count: int) -> torch.Tensor:
        return torch.randn(
            count,
            3,
            self.size,
            self.size,
            generator=torch.Generator().manual_seed(2),
        )


def tiny_clip(name: str, directory: Path) -> TinyClip:
    """Build the shrunk model of a built-in configuration, its weights random and away
    from their initial values.

    directory: where a configuration for transformers may be written.
    """
    config = tiny_config(name, directory)
    torch.manual_seed(0)
    with small_timm_models(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        clip = open_clip.create_model(name, load_weights=False, **config)
    shake(clip)
    return TinyClip(
        clip.eval().requires_grad_(False),
        layout_of(name, config),
        image_size(config),
    )


def shake(clip: torch.nn.Module) -> None:
    """Move weights away from zeros and ones, so that every one of them shows in a
    feature.
    """
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def image_size(config: dict[str, Any]) -> int:
    return int(config["vision_cfg"]["image_size"])


def tiny_config(name: str, directory: Path) -> dict[str, Any]:
    """The configuration with small numbers; kinds of layers, pooling and masks stay."""
    config = copy.deepcopy(open_clip.get_model_config(name))
    vision = config["vision_cfg"]
    text = config["text_cfg"]
    if "timm_model_name" in vision:
        vision |= {
            "image_size": _timm_size(vision["timm_model_name"]),
            "timm_model_pretrained": False,
        }
    elif isinstance(vision["layers"], list):
        vision |= {
            "layers": [1, 1, 1, 1],
            "width": 8,
            "image_size": 64,
        }
    else:
        vision |= {"layers": LAYERS, "width": WIDTH, "head_width": WIDTH // HEADS}
        vision["image_size"] = 4 * vision["patch_size"]
    if "hf_model_name" in text:
        text |= {
            "hf_model_name": str(_write_hf_config(text["hf_model_name"], directory)),
            "hf_model_pretrained": False,
        }
    text |= {"width": WIDTH, "heads": HEADS, "layers": LAYERS, "vocab_size": VOCABULARY}
    tiny = {"embed_dim": WIDTH, "vision_cfg": vision, "text_cfg": text}
    if "multimodal_cfg" in config:
        sizes = {"width": WIDTH, "heads": HEADS, "layers": 1}
        tiny["multimodal_cfg"] = config["multimodal_cfg"] | sizes
    return tiny


def layout_of(name: str, config: dict[str, Any]) -> TextLayout:
    """Start, end and padding as the model's tokenizer has them, within the small
    vocabulary.
    """
    text = config["text_cfg"]
    context = int(text.get("context_length", 77))
    tokenizer = text.get("hf_tokenizer_name", "")
    # the first that the tokenizer's name has: start, end and padding
    for name, ids in {
        "bert-base-uncased": ((101,), 0, 0),
        "SigLIP2": ((), 1, 0),
        "SigLIP": ((), 1, 1),
        "mt5": ((), 1, 0),
        "nllb": ((118,), 2, 1),
        "": ((0,), 2, 1),
    }.items():
        if tokenizer and name in tokenizer:
            return TextLayout(context, *ids)
    return TextLayout(context, (VOCABULARY - 2,), VOCABULARY - 1, 0)


@contextmanager
def small_timm_models() -> Iterator[None]:
    """Within it, timm builds every model with few layers and small widths."""
    whole = timm.create_model
    whole_stem = ConvStem

    def create(name: str, **options: Any) -> Any:
        return whole(name, **_timm_sizes(name), **options)

    # of vit_base_mci, which fixes the width
    def stem(*, channels: tuple[int, ...], **options: Any) -> ConvStem:
        return whole_stem(
            channels=tuple(WIDTH * each // channels[-1] for each in channels), **options
        )

    with (
        mock.patch("timm.create_model", create),
        mock.patch(f"{ConvStem.__module__}.ConvStem", stem),
    ):
        yield


def _timm_size(name: str) -> int:
    if name.startswith("swin"):
        return 224
    if name.startswith(("fastvit", "convnext")):
        return 128
    patch = next(
        (int(part[5:]) for part in name.split("_") if part.startswith("patch")), 16
    )
    return 4 * patch


def _timm_sizes(name: str) -> dict[str, Any]:
    if name.startswith("convnext"):
        return {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 32)}
    if name.startswith("swin"):
        return {
            "embed_dim": 16,
            "depths": (1, 1, 1, 1),
            "num_heads": (1, 2, 2, 2),
        }
    if name.startswith("fastvit"):
        stages = 5 if name.endswith(("mci3", "mci4")) else 4
        return {"layers": (1,) * stages, "embed_dims": (16, 32, 32, 32, 32)[:stages]}
    sizes: dict[str, Any] = {
        "embed_dim": WIDTH,
        "depth": LAYERS,
        "num_heads": HEADS,
        "img_size": _timm_size(name),
    }
    if name.startswith("vitamin"):
        conv = VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6)
        sizes["embed_cfg"] = VitCfg(
            embed_dim=(8, 16, WIDTH),
            depths=(1, 1, 1),
            stem_width=8,
            conv_cfg=conv,
            head_type="1d",
        )
    return sizes


def _write_hf_config(name: str, directory: Path) -> Path:
    kind = next(
        kind for kind in ("xlm-roberta", "roberta", "mt5", "nllb") if kind in name
    )
    path = directory / kind
    path.mkdir(parents=True, exist_ok=True)
    content = (
        {"vocab_size": VOCABULARY}
        | (_ENCODER if "roberta" in kind else {})
        | _HF_CONFIGS[kind]
    )
    (path / "config.json").write_text(json.dumps(content))
    return path


Kind = Literal["t5", "gemma", "xlm", "bert", "nllb"]

_CORPUS = [
    "a red square and a green circle, it's not blue",
    "an orange triangle on a purple cross in black",
    "two brown dogs run across the wet lawn with one yellow ball",
    "Das ist ein schönes Bild, niño, œuvre 12 34 567",
]
_CLASSES = {
    "t5": "T5",
    "gemma": "Gemma",
    "xlm": "XLMRoberta",
    "bert": "Bert",
    "nllb": "Nllb",
}
_UNIGRAMS = {  # special tokens, and what surrounds a text
    "t5": (["<pad>", "</s>", "<unk>"], "$A </s>"),
    "xlm": (["<s>", "<pad>", "</s>", "<unk>", "<mask>"], "<s> $A </s>"),
    "nllb": (["<s>", "<pad>", "</s>", "<unk>", "eng_Latn"], "eng_Latn $A </s>"),
}
_NAMES = {
    "t5": {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
    "gemma": {
        "pad_token": "<pad>",
        "eos_token": "<eos>",
        "bos_token": "<bos>",
        "unk_token": "<unk>",
    },
    "xlm": {
        "bos_token": "<s>",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    },
    "bert": {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    },
    "nllb": {
        "bos_token": "<s>",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    },
}


def kind_of_tokenizer(name: str) -> Kind:
    """The kind of vocabulary that an `hf_tokenizer_name` of open_clip has."""
    if "bert-base-uncased" in name:
        return "bert"
    if "SigLIP2" in name:
        return "gemma"
    if "SigLIP" in name or "mt5" in name:
        return "t5"
    return "nllb" if "nllb" in name else "xlm"


def write_tokenizer(kind: Kind, directory: Path) -> int:
    """Write tokenizer.json and tokenizer_config.json; return the number of tokens."""
    if kind in _UNIGRAMS:
        tokenizer = _unigram(*_UNIGRAMS[kind])
    else:
        tokenizer = {"gemma": _gemma, "bert": _bert}[kind]()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True) for token in _NAMES[kind].values()]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    names: dict[str, Any] = {
        "tokenizer_class": f"{_CLASSES[kind]}Tokenizer",
        **_NAMES[kind],
    }
    settings = names | {"model_max_length": 512}
    if kind == "gemma":  # as the settings beside SigLIP 2's vocabulary have it
        settings |= {
            "add_bos_token": False,
            "add_eos_token": True,
            "padding_side": "right",
        }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return int(tokenizer.get_vocab_size())


def write_tiny_model(name: str, directory: Path) -> Path:
    """Write a shrunk model of a built-in configuration as a model directory.

    Writing and loading it need `small_timm_models` around them, where timm builds its
    image tower.
    """
    directory.mkdir()
    config = tiny_config(name, directory)
    text = config["text_cfg"]
    if tokenizer := text.get("hf_tokenizer_name"):
        text["vocab_size"] = write_tokenizer(kind_of_tokenizer(tokenizer), directory)
    else:
        text["vocab_size"] = _write_byte_pairs(directory / "bpe.txt.gz")
        text["tokenizer_kwargs"] = {"bpe_path": "bpe.txt.gz"}
    if encoder := text.get("hf_model_name"):
        file = Path(encoder) / "config.json"
        file.write_text(
            json.dumps(
                json.loads(file.read_text()) | {"vocab_size": text["vocab_size"]}
            )
        )
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        clip = open_clip.create_model(name, load_weights=False, **config)
    shake(clip)
    # Some weights are never set, and hold whatever was in memory.
    state = {
        name: torch.nan_to_num(value).clamp(-99, 99)
        for name, value in clip.state_dict().items()
    }
    save_file(state, str(directory / "open_clip_model.safetensors"))
    if encoder:
        text["hf_model_name"] = Path(encoder).name
    whole = open_clip.get_model_config(name) | config
    size = image_size(config)
    half = [0.5, 0.5, 0.5]
    preprocess = {
        "size": [size, size],
        "mean": half,
        "std": half,
        "resize_mode": "squash",
    }
    (directory / MODEL_CONFIG).write_text(
        json.dumps({"model_cfg": whole, "preprocess_cfg": preprocess})
    )
    return directory


def _write_byte_pairs(file: Path) -> int:
    merges = ["r e", "re d</w>", "s q", "c i", "b l"]
    with gzip.open(file, "wt", encoding="utf-8") as opened:
        opened.write("\n".join(["#version: 0.2", *merges]))
    return 2 * 256 + len(merges) + 2


def _unigram(specials: list[str], template: str) -> Tokenizer:
    """Make a vocabulary of control tokens, letters, and the words of the corpus."""
    text = " ".join(_CORPUS)
    words = list(dict.fromkeys(f"▁{word}" for word in text.split()))
    ranked = ["▁", *sorted(set(text.replace(" ", ""))), *words]
    pieces = [(piece, 0.0) for piece in specials] + [
        (piece, -1.0 if len(piece) > 1 else -5.0) for piece in ranked
    ]
    tokenizer = Tokenizer(
        models.Unigram(pieces, unk_id=specials.index("<unk>"), byte_fallback=False)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme="always"
    )
    used = [
        (token, specials.index(token)) for token in template.split() if token != "$A"
    ]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=used
    )
    return tokenizer


def _gemma() -> Tokenizer:
    specials = ["<pad>", "<eos>", "<bos>", "<unk>"]
    trained = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[*specials, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    trained.train_from_iterator([text.replace(" ", "▁") for text in _CORPUS], trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(
        models.BPE(
            model["vocab"],
            merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    return tokenizer


def _bert() -> Tokenizer:
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = " ".join(_CORPUS).lower().replace(",", " ,").replace("'", " ' ").split()
    letters = sorted(set("".join(words)) | set("abcdefghijklmnopqrstuvwxyz"))
    pieces = list(
        dict.fromkeys(
            [*specials, *letters, *(f"##{letter}" for letter in letters), *words]
        )
    )
    tokenizer = Tokenizer(
        models.WordPiece(
            {piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"
        )
    )
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer
