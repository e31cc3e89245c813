"""Model directories as users have them: a shrunk open_clip model of any family, with a small vocabulary of its kind."""

import gzip
import json
import warnings
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from dcar_core.model.config import MODEL_CONFIG
from tests.support.tiny_clips import image_size, shake, tiny_config

Kind = Literal["t5", "gemma", "xlm", "bert", "nllb"]

_CORPUS = [
    "a red square and a green circle, it's not blue",
    "two brown dogs run across the wet lawn with one yellow ball",
    "an orange triangle on a purple cross in black",
    "Das ist ein schönes Bild, niño, œuvre 12 34 567",
]
_CLASSES = {"t5": "T5", "gemma": "Gemma", "xlm": "XLMRoberta", "bert": "Bert", "nllb": "Nllb"}
_UNIGRAMS = {  # special tokens, and what surrounds a text
    "t5": (["<pad>", "</s>", "<unk>"], "$A </s>"),
    "xlm": (["<s>", "<pad>", "</s>", "<unk>", "<mask>"], "<s> $A </s>"),
    "nllb": (["<s>", "<pad>", "</s>", "<unk>", "eng_Latn"], "eng_Latn $A </s>"),
}
_NAMES = {
    "t5": {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
    "gemma": {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"},
    "xlm": {
        "bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>",
    },
    "bert": {
        "pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]",
    },
    "nllb": {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
}  # fmt: skip


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
    tokenizer = _unigram(*_UNIGRAMS[kind]) if kind in _UNIGRAMS else {"gemma": _gemma, "bert": _bert}[kind]()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in _NAMES[kind].values()])
    tokenizer.save(str(directory / "tokenizer.json"))
    names: dict[str, Any] = {"tokenizer_class": f"{_CLASSES[kind]}Tokenizer", **_NAMES[kind]}
    settings = names | {"model_max_length": 512}
    if kind == "gemma":  # as the settings beside SigLIP 2's vocabulary have it
        settings |= {"add_bos_token": False, "add_eos_token": True, "padding_side": "right"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return int(tokenizer.get_vocab_size())


def write_tiny_model(name: str, directory: Path) -> Path:
    """Write a shrunk model of a built-in configuration as a model directory.

    Writing and loading it need `small_timm_models` around them, where timm builds its image tower.
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
        file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": text["vocab_size"]}))
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        clip = open_clip.create_model(name, load_weights=False, **config)
    shake(clip)
    # Some weights are never set, and hold whatever was in memory.
    state = {name: torch.nan_to_num(value).clamp(-99, 99) for name, value in clip.state_dict().items()}
    save_file(state, str(directory / "open_clip_model.safetensors"))
    if encoder:
        text["hf_model_name"] = Path(encoder).name
    whole = open_clip.get_model_config(name) | config
    size, half = image_size(config), [0.5, 0.5, 0.5]
    preprocess = {"size": [size, size], "mean": half, "std": half, "resize_mode": "squash"}
    (directory / MODEL_CONFIG).write_text(json.dumps({"model_cfg": whole, "preprocess_cfg": preprocess}))
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
    pieces = [(piece, 0.0) for piece in specials] + [(piece, -1.0 if len(piece) > 1 else -5.0) for piece in ranked]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=specials.index("<unk>"), byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    used = [(token, specials.index(token)) for token in template.split() if token != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    return tokenizer


def _gemma() -> Tokenizer:
    specials = ["<pad>", "<eos>", "<bos>", "<unk>"]
    trained = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=[*specials, *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False
    )
    trained.train_from_iterator([text.replace(" ", "▁") for text in _CORPUS], trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(models.BPE(model["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    return tokenizer


def _bert() -> Tokenizer:
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = " ".join(_CORPUS).lower().replace(",", " ,").replace("'", " ' ").split()
    letters = sorted(set("".join(words)) | set("abcdefghijklmnopqrstuvwxyz"))
    pieces = list(dict.fromkeys([*specials, *letters, *(f"##{letter}" for letter in letters), *words]))
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer
