"""Texts for training the base model: captions and phrases, with typing errors, and
their encoding.
"""

import json
import random
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from captions import (
    domain_caption,
    facts,
    sample_caption,
    short_caption,
    spoken_caption,
    with_typo,
)
from torch import Tensor

# Share of each kind among a step's phrases, and the temperature of the encoder's
# scores.
KINDS = {
    "own": 0.31,
    "synonym": 0.16,
    "flag": 0.03,
    "replaced": 0.06,
    "combination": 0.20,
    "word": 0.10,
    "definition": 0.09,
    "example": 0.05,
}
TEMPERATURE = 0.03
ARTICLES = ("a", "the", "an emoji of", "picture of")


class Texts:
    """Draws captions and phrases, each perhaps with a typing error, and knows of which
    emoji they are true.
    """

    def __init__(
        self,
        renders: Path,
        emoji: dict,
        names: list[str],
        rng: random.Random,
    ) -> None:
        self.emoji = emoji
        self.rng = rng
        self.places = {name: place for place, name in enumerate(names)}
        self.known: dict[str, np.ndarray] = {}
        for place, name in enumerate(names):
            for fact in facts(emoji[name]):
                self.known.setdefault(fact, np.zeros(len(names), bool))[place] = True
        record = json.loads((renders / "phrases.json").read_text())
        arrays = np.load(renders / "phrases.npz")
        self.phrases = record["phrases"]
        kinds = np.array(record["kinds"])
        self.kinds = {kind: np.flatnonzero(kinds == kind) for kind in KINDS}
        seen = np.array([name in self.places for name in record["base"]])
        self.base = torch.tensor([self.places.get(name, 0) for name in record["base"]])
        self.vectors = arrays["vectors"]
        self.rows = arrays["rows"]
        self.scores = np.where(
            seen[self.rows],
            arrays["scores"].astype(np.float32),
            -1.0,
        )

    def captions(self, names: list[str]) -> tuple[list[str], list[str], Tensor]:
        """Return a caption of each emoji, the captions as typed, and bool (captions,
        emoji) of which it is true.
        """
        texts = []
        true = torch.zeros(len(names), len(self.places), dtype=torch.bool)
        for row, name in enumerate(names):
            text, required = self._caption(self.emoji[name])
            texts.append(text.lower())
            if required is not None:
                true[row] = torch.from_numpy(
                    np.logical_and.reduce([self.known[fact] for fact in required])
                )
            true[row, self.places[name]] = True
        typed = [
            with_typo(text, self.rng) if self.rng.random() < 0.08 else text
            for text in texts
        ]
        return texts, typed, true

    def _caption(self, emoji: dict) -> tuple[str, frozenset[str] | None]:
        kind = self.rng.random()
        if kind < 0.20:
            return spoken_caption(emoji, self.rng), None
        if kind < 0.35:
            return short_caption(emoji, self.rng)
        if kind < 0.50:
            return domain_caption(emoji), None
        return sample_caption(emoji, self.rng)

    def draw_phrases(self, count: int) -> tuple[list[str], np.ndarray]:
        """Return about `count` phrases as typed, and their numbers."""
        rng = self.rng
        numbers = [
            n
            for kind, share in KINDS.items()
            for n in rng.choices(self.kinds[kind], k=round(count * share))
        ]
        texts = [self.phrases[n] for n in numbers]
        texts = [
            with_typo(text, rng) if rng.random() < 0.25 else text for text in texts
        ]
        texts = [
            f"{rng.choice(ARTICLES)} {text}" if rng.random() < 0.06 else text
            for text in texts
        ]
        return texts, np.array(numbers)


class TextEncoder:
    """Encodes texts of any length with the model's text tower, cut to the longest of
    each part.
    """

    def __init__(
        self,
        model: open_clip.CLIP,
        tokenizer: open_clip.SimpleTokenizer,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Return the tower's output (n, width) and the normalised features (n, dim)."""
        order = np.argsort([len(text) for text in texts], kind="stable")
        parts = [
            self._encode([texts[row] for row in rows])
            for rows in np.array_split(order, 3)
        ]
        back = torch.from_numpy(np.argsort(order))
        hidden = torch.cat(parts)[back]
        return hidden, F.normalize(hidden @ self.model.text_projection, dim=-1)

    def _encode(self, texts: list[str]) -> Tensor:
        tokens = self.tokenizer(texts)
        ends = tokens.argmax(1)
        length = int(ends.max()) + 1
        model = self.model
        with torch.autocast("cpu", torch.bfloat16, enabled=model.training):
            x = (
                model.token_embedding(tokens[:, :length])
                + model.positional_embedding[:length]
            )
            x = model.transformer(x, attn_mask=model.attn_mask[:length, :length])[
                torch.arange(len(texts)), ends
            ]
        return model.ln_final(x.float())
