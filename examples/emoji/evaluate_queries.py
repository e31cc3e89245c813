"""Measure short queries, as people type them, on both domains: hit@1, hit@5 and
nDCG@10.

    python examples/emoji/evaluate_queries.py --queries test [--split test] python
    examples/emoji/evaluate_queries.py --base examples/emoji/build/base --domains
    twemoji --zero-shot python examples/emoji/evaluate_queries.py --zero-shot --captions
    [--encoder MODEL_FOLDER] python examples/emoji/evaluate_queries.py --domains twemoji
    --checkpoints results/twemoji/runs/query-prompts/*

- queries/test.tsv is for the model card alone; choose on queries/validation.tsv.
- Every image of the style is in the gallery, with all skin tones, and vectors alone
  rank it. Half of them trained the checkpoint. --split test ranks the images of the
  test emoji alone, for the queries that these answer. --held-out ranks all images, for
  the queries that no image of a training emoji answers.
- Many single words are tags or names of emoji, which the base model was trained on.
  --new-texts leaves them out.
- With --captions, the items' captions are ranked as well, and the sums of both vectors:
  what is left to the image tower. With --encoder, the sentence encoder of phrases.py
  ranks the captions, too.
- A hit@k is a query with a right answer among the first k. nDCG@10 counts every right
  answer alike.
"""

import argparse
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from dcar_core import Encoder

HERE = Path(__file__).parent
DOMAINS = ("twemoji", "openmoji")
TONES = dict.fromkeys(range(0x1F3FB, 0x1F400))
JOINER = "\u200d"
VARIATION = "\ufe0f"
METRICS = ("hit@1", "hit@5", "nDCG@10")


@dataclass(frozen=True)
class Query:
    """A text, its kind ("word", "typo", ..), and the rows of the gallery that answer
    it.
    """

    kind: str
    text: str
    answers: frozenset[int]


def read_queries(file: Path, rows: list[dict]) -> list[Query]:
    """Read lines of kind, text and answers, separated by tabs; see `answer_test` for
    the answers.

    Raises:
        ValueError: an answer that no image of the gallery fits.
    """
    queries = []
    for line in file.read_text().splitlines():
        kind, text, answers = line.split("\t")
        fitting: set[int] = set()
        for answer in answers.split():
            is_answer = answer_test(answer)
            found = {number for number, row in enumerate(rows) if is_answer(row)}
            if not found:
                raise ValueError(
                    f"{file}: no image fits {answer!r} of the query {text!r}"
                )
            fitting |= found
        queries.append(Query(kind, text, frozenset(fitting)))
    return queries


def answer_test(answer: str) -> Callable[[dict], bool]:
    """Return a test of metadata rows for one answer.

    X is an emoji in any skin tone, and =X in exactly this one. X* is any emoji that
    begins with X. @X is any person whose second part begins with X, such as a
    profession. %NAME is any emoji of the subgroup.
    """
    form = answer[0]
    text = answer[1:].replace(VARIATION, "")
    if form == "%":
        return lambda row: row["meta_category"] == text
    if form == "=":
        return lambda row: without_tone(row["char"], keep=True) == text
    if form == "@":
        return lambda row: (
            without_tone(row["char"]).partition(JOINER)[2].startswith(text)
        )
    whole = answer.replace(VARIATION, "")
    if len(whole) > 1 and whole.endswith("*"):
        return lambda row: without_tone(row["char"]).startswith(whole[:-1])
    return lambda row: without_tone(row["char"]) == whole


@cache
def without_tone(char: str, keep: bool = False) -> str:
    """Return the characters of an emoji without variation selectors and, unless kept,
    without skin tones.
    """
    text = char.replace(VARIATION, "")
    return text if keep else text.translate(TONES)


def read_domain(domain: str) -> tuple[list[dict], list[bytes]]:
    """Return the rows of metadata.jsonl, and the image file of each."""
    rows = [
        json.loads(line)
        for line in (HERE / domain / "metadata.jsonl").read_text().splitlines()
    ]
    with tarfile.open(HERE / domain / "gallery.tar") as tar:
        files = {
            member.name: tar.extractfile(member).read()
            for member in tar
            if member.isfile()
        }
    return rows, [files[row["file_name"]] for row in rows]


def among(queries: list[Query], chosen: list[int]) -> list[Query]:
    """Return the queries that some of the chosen rows answer; their answers are places
    among these rows.
    """
    place_of = {row: place for place, row in enumerate(chosen)}
    answers = [
        frozenset(place_of[row] for row in query.answers if row in place_of)
        for query in queries
    ]
    return [
        replace(query, answers=own)
        for query, own in zip(queries, answers, strict=True)
        if own
    ]


def measure(scores: np.ndarray, queries: list[Query]) -> np.ndarray:
    """Return hit@1, hit@5 and nDCG@10 of each query, (Q, 3), for scores (Q, images)."""
    gains = 1 / np.log2(np.arange(2, 12))
    values = []
    for row, query in zip(scores, queries, strict=True):
        hits = np.array(
            [
                int(number) in query.answers
                for number in np.argsort(-row, kind="stable")[:10]
            ]
        )
        values.append(
            (
                hits[0],
                hits[:5].any(),
                gains[hits].sum() / gains[: len(query.answers)].sum(),
            )
        )
    return np.array(values, dtype=float)


def held_out(queries: list[Query], rows: list[dict]) -> list[Query]:
    """Return the queries that no image of a training emoji answers."""
    return [
        query
        for query in queries
        if not any(rows[row]["split"] == "train" for row in query.answers)
    ]


def new_texts(queries: list[Query], rows: list[dict]) -> list[Query]:
    """Return the queries that are neither a tag nor a name of an emoji, of which the
    base model's texts are made.
    """
    known = {
        text.casefold()
        for row in rows
        for text in (row["category"], *row["attributes"], *row["caption"].split(", "))
    }
    return [query for query in queries if query.text.casefold() not in known]


def table(results: dict[str, tuple[list[Query], np.ndarray]]) -> str:
    """Return a Markdown table: one row per model, with the kinds' hit@5 after the means
    of all queries.
    """
    kinds = list(
        dict.fromkeys(
            query.kind for queries, _ in results.values() for query in queries
        )
    )
    lines = [
        "| | "
        + " | ".join(["queries", *METRICS, *(f"hit@5 {kind}" for kind in kinds)])
        + " |",
        "| --- " * (2 + len(METRICS) + len(kinds)) + "|",
    ]
    for name, (queries, values) in results.items():
        own = np.array([query.kind for query in queries])
        cells = [*values.mean(0), *(values[own == kind, 1].mean() for kind in kinds)]
        shares = [f"{100 * cell:.1f}" for cell in cells]
        lines.append(f"| {name} | " + " | ".join([str(len(queries)), *shares]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Encode each domain's gallery and the queries with the base model and with the
    checkpoint, and print the table.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--queries",
        choices=("validation", "test"),
        default="validation",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--split",
        choices=("train", "val", "test"),
        help="rank the images of these emoji alone",
    )
    parser.add_argument(
        "--held-out",
        action="store_true",
        help="without the queries that a training emoji answers",
    )
    parser.add_argument(
        "--new-texts",
        action="store_true",
        help="without the queries that are a tag or name of an emoji",
    )
    parser.add_argument(
        "--domains",
        nargs="+",
        choices=DOMAINS,
        default=DOMAINS,
        help="default: both",
    )
    parser.add_argument(
        "--base",
        type=Path,
        default=HERE / "base",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--zero-shot",
        action="store_true",
        help="the base model alone, without the checkpoints",
    )
    parser.add_argument(
        "--checkpoints",
        type=Path,
        nargs="+",
        help="of one domain; default: the bundled one of each",
    )
    parser.add_argument(
        "--captions",
        action="store_true",
        help="rank the captions of the items as well",
    )
    parser.add_argument(
        "--encoder",
        type=Path,
        help="with --captions: the folder of a sentence encoder",
    )
    args = parser.parse_args()
    if args.encoder is not None and not args.captions:
        parser.error("--encoder ranks captions: give --captions as well")
    if args.checkpoints and (args.zero_shot or len(args.domains) != 1):
        parser.error(
            "--checkpoints belong to one domain: name it with --domains, and leave out"
            " --zero-shot"
        )
    results = {}
    for domain in args.domains:
        rows, images = read_domain(domain)
        queries = read_queries(HERE / "queries" / f"{args.queries}.tsv", rows)
        if args.held_out:
            queries = held_out(queries, rows)
        if args.new_texts:
            queries = new_texts(queries, rows)
        if args.split is not None:
            chosen = [
                row for row, each in enumerate(rows) if each["split"] == args.split
            ]
            queries = among(queries, chosen)
            rows = [rows[row] for row in chosen]
            images = [images[row] for row in chosen]
        models = {"zero-shot": args.base}
        if args.checkpoints:
            models |= {
                f"{checkpoint.parent.name} {checkpoint.name}": checkpoint
                for checkpoint in args.checkpoints
            }
        elif not args.zero_shot:
            models["adapted"] = HERE / domain / "checkpoint"
        captions = [row["caption"] for row in rows]
        texts = [query.text for query in queries]
        if args.encoder is not None:
            from phrases import SentenceEncoder

            sentences = SentenceEncoder(args.encoder)
            scores = (sentences.encode(texts) @ sentences.encode(captions).T).numpy()
            results[f"{domain}, sentence encoder"] = queries, measure(scores, queries)
        for name, source in models.items():
            encoder = Encoder.load(source)
            items = {"": encoder.encode_images(images)}
            if args.captions:
                items |= {", captions": encoder.encode_text(captions)}
                summed = np.sum([*items.values()], axis=0)
                items |= {
                    ", images + captions": (
                        summed / np.linalg.norm(summed, axis=1, keepdims=True)
                    )
                }
            for kind, vectors in items.items():
                scores = encoder.encode_text(texts) @ vectors.T
                results[f"{domain}, {name}{kind}"] = queries, measure(scores, queries)
    print(table(results))


if __name__ == "__main__":
    main()
