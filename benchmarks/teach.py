"""Names taught by N examples, over HTTP: as words of queries, as tags, and what they
cost. In percent:

    python benchmarks/teach.py data/index/twemoji data/index/openmoji
    data/benchmarks/many bed/photos

- `words`: queries of a group of people and a skin tone. Right is an image of the group
  with the tone; examples are left out. First result and R-precision, by the taught
  name, by it with `hybrid`, and by the true one.
- `things`, `subgroups`, of 12 to 400 emoji: the precision of members, that of members
  beside the examples, the recall of the others, and average precision. No image of
  `unseen` things trained the model; `chosen` ones are those that the constants of
  `app/search/concepts.py` were tuned on first; all have been in view since.
- `photos`, of `photo_base.py`'s maps, by `dcar zero-shot` of its base, which knows the
  categories of `known`.
- `many`: seconds to teach and milliseconds of searches among 100,000 drawn vectors,
  median and first.
"""

import hashlib
import json
import re
import shutil
import tempfile
import time
import zlib
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import defaultdict
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from clusters import Clusters
from service import ROOT, made_index, serving

KEY = "benchmark-of-taught-names"
MAX_K = 20_000
# "woman and man holding hands" are "holding hands"
PEOPLE = re.compile(r"\b(and|m[ae]n|wom[ae]n|person|people)\b")
Groups = dict[str, dict[str, str]]  # ids with their tones or splits, by name


class Client(httpx.Client):
    def teach(self, ids: list[str]) -> None:
        self.put("/concepts/taught", json={"ids": ids}).raise_for_status()

    def search(self, query: str, **options: Any) -> Any:
        return (
            self.post("/search/text", json={"query": query, **options})
            .raise_for_status()
            .json()
        )


def words(
    client: Client,
    groups: Groups,
    count: int,
    rng: np.random.Generator,
) -> list[float]:
    values = list[tuple[bool, float]]()
    for thing, tones in groups.items():
        client.teach(ids := rng.choice([*tones], count, replace=False).tolist())
        for tone in sorted({*tones.values()}):
            right = {item for item in tones if tones[item] == tone} - {*ids}
            ways = (
                (f"@taught {tone}", False),
                (f"@taught {tone}", True),
                (f"{thing}, {tone}", False),
            )
            for text, hybrid in ways if right else ():
                results = [
                    result["id"]
                    for result in client.search(text, k=100, hybrid=hybrid)["results"]
                ]
                first = [item for item in results if item not in ids][: len(right)]
                values.append(
                    (first[0] in right, len(right.intersection(first)) / len(right))
                )
    return np.reshape(values, (-1, 6)).mean(0).tolist()  # type: ignore[no-any-return]


def tags(
    client: Client,
    groups: Groups,
    count: int,
    rng: np.random.Generator,
) -> list[float]:
    values = list[tuple[float, float, float]]()
    new = np.zeros(2)
    for members in (ids for ids in groups.values() if len(ids) > count):
        client.teach(ids := rng.choice([*members], count, replace=False).tolist())
        results = client.search("@taught", k=MAX_K, fields=["concept"])["results"]
        others = [result for result in results if result["id"] not in ids]
        is_right = np.array([result["id"] in members for result in others])
        is_tagged = np.array([bool(result["metadata"]) for result in others])
        hits = (is_right & is_tagged).sum()
        tagged = is_tagged.sum()
        average = (np.cumsum(is_right) / np.arange(1, len(is_right) + 1))[
            is_right
        ].mean()
        values.append(
            ((hits + count) / (tagged + count), hits / is_right.sum(), average)
        )
        new += hits, tagged
    return np.insert(np.mean(values, 0), 1, new[0] / max(new[1], 1)).tolist()  # type: ignore[no-any-return]


def groups_of(style: str) -> dict[str, Groups]:
    lines = (
        (ROOT / "examples/emoji" / style / "metadata.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    people, things, subgroups = (
        defaultdict[str, dict[str, str]](dict) for _ in range(3)
    )
    for item in map(json.loads, lines):
        thing = (
            PEOPLE.sub("", re.split("[,:]", item["category"])[0]).strip() or "person"
        )
        tones = [name for name in item["attributes"] if name.endswith("skin tone")]
        if len(tones) == 1:
            people[thing][item["id"]] = tones[0]
        things[thing][item["id"]] = subgroups[item["meta_category"]][item["id"]] = item[
            "split"
        ]
    parts = defaultdict[str, Groups](
        dict, words={name: ids for name, ids in people.items() if len(ids) in (15, 20)}
    )
    for kind, groups in (("things", things), ("subgroups", subgroups)):
        for name, ids in groups.items():
            is_unseen = kind == "things" and {*ids.values()} == {"test"}
            if is_unseen:
                half = "unseen"
            elif zlib.crc32(name.encode()) % 2:
                half = "chosen"
            else:
                half = "other"
            if 12 <= len(ids) <= 400:
                parts[f"{half} {kind}"][name] = ids
    return parts


def photos_of(bed: Path) -> dict[str, Groups]:
    parts = defaultdict[str, Groups](lambda: defaultdict(dict))
    for table in bed.glob("*.jsonl"):
        for row in map(json.loads, table.read_text(encoding="utf-8").splitlines()):
            # as `gallery.scan` makes it
            item_id = hashlib.sha256(row["image"].encode()).hexdigest()[:20]
            parts[table.stem][row["category"]][item_id] = row["split"]
    return {
        part: {name: ids for name, ids in parts[part].items() if 12 <= len(ids) <= 400}
        for part in sorted(parts)
    }


def judge(client: Client, style: str, parts: dict[str, Groups]) -> None:
    for part, groups in parts.items():
        for count in (1, 3, 5, 10):
            values = (words if part == "words" else tags)(
                client,
                groups,
                count,
                np.random.default_rng(count),
            )
            figures = " ".join(f"{100 * value:.1f}" for value in values)
            print(f"{style}, {len(groups)} {part}, N = {count}: {figures}", flush=True)


def cost(client: Client) -> None:
    took = defaultdict[str, list[float]](list)
    for turn in range(200):
        if turn % 20 == 0:
            started = time.perf_counter()
            client.teach([str(10 * turn + row) for row in range(5)])
            took["s to teach"].append(time.perf_counter() - started)
        for number, text in enumerate(("dark skin tone", "@taught dark skin tone")):
            # a new text
            took[f"ms of {text}"].append(
                client.search(f"{text} {2 * turn + number}")["took_ms"]
            )
    print(
        {
            name: [*map(float, np.round((np.median(times), times[0]), 3))]
            for name, times in took.items()
        }
    )


if __name__ == "__main__":
    parser = ArgumentParser(
        description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "indexes",
        type=Path,
        nargs="+",
        help="named after their style; a new one is of drawn vectors",
    )
    limits = {"max_k": MAX_K, "max_window": MAX_K, "deadline_ms": 60_000}
    checkpoint = ROOT / "examples/emoji/twemoji/checkpoint"
    draw = Clusters(100_000, 256).draw
    for path in parser.parse_args().indexes:
        made_index(path, checkpoint, lambda: draw(100_000, seed=1), [""] * 100_000)
        folder = tempfile.TemporaryDirectory()  # for a copy, since teaching changes it
        index = Path(shutil.copytree(path, f"{folder.name}/index"))
        with folder, serving(index, writes=True, admin_key=KEY, **limits) as server:
            client = Client(
                base_url=f"http://127.0.0.1:{server.port}",
                headers={"X-API-Key": KEY},
                timeout=60,
            )
            if path.name == "many":
                cost(client)
            else:
                judge(
                    client,
                    path.name,
                    (
                        photos_of(path.parent)
                        if path.name == "photos"
                        else groups_of(path.name)
                    ),
                )
