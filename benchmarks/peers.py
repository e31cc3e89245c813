"""Compare the service with clip-retrieval and infinity: the same load, in turns, on the
same cores.

    python benchmarks/peers.py --clip-retrieval http://127.0.0.1:8111 --infinity
    http://127.0.0.1:8121

Each receives unique texts and images and encodes them with a ViT-B/32 with random
weights. clip-retrieval and this service also search 100,000 vectors; infinity only
embeds. Figures are medians of `--rounds`. Start both peers in environments of their own
first (for clip-retrieval 2.45.0 and infinity 0.0.78, Python 3.11):

    pip install 'setuptools<81' wheel pip install --no-build-isolation
    clip-retrieval==2.45.0 'setuptools<81' 'numpy<2' clip-retrieval index
    --embeddings_folder EMBEDDINGS --index_folder INDEX echo '{"bench": "INDEX"}' >
    indices.json clip-retrieval back --port 8111 --indices_paths indices.json
    --clip_model open_clip:ViT-B-32/WEIGHTS.pt \\
        --enable_mclip_option False --provide_safety_model False
        --provide_violence_detector False \\ --provide_aesthetic_embeddings False
        --columns_to_return '["url","caption"]'

    pip install 'infinity_emb[server,torch,vision,logging]==0.0.78'
        'optimum>=1.24,<1.25' 'transformers<4.50' \\ 'numpy<2' aiohttp
    infinity_emb v2 --model-id MODEL --served-model-name clip --engine torch --device
    cpu --host 127.0.0.1 --port 8121

- EMBEDDINGS has img_emb/img_emb_0.npy, float16 or float32 (100000, 512), and
  metadata/metadata_0.parquet with as many rows; WEIGHTS.pt is the state dict of
  open_clip's ViT-B-32; MODEL is transformers' CLIPModel with CLIPConfig's own values,
  and its processor.
- With these versions infinity truncates texts after 20 tokens; the texts used here are
  shorter.
"""

import argparse
import base64
import itertools
import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from load import Requests, Tally, closed_loop, post, unique_texts
from serve import images, median, new_images, new_texts, run
from service import random_vit, serving


def _clip_retrieval(query: str | bytes) -> dict[str, object]:
    if isinstance(query, str):
        asked = {"text": query}
    else:
        asked = {"image": base64.b64encode(query).decode()}
    return {
        **asked,
        "modality": "image",
        "num_images": 10,
        "num_result_ids": 10,
        "indice_name": "bench",
    }


def _infinity(query: str | bytes) -> dict[str, object]:
    is_image = not isinstance(query, str)
    if isinstance(query, bytes):
        given = f"data:image/jpeg;base64,{base64.b64encode(query).decode()}"
    else:
        given = query
    return {
        "model": "clip",
        "input": [given],
        "modality": "image" if is_image else "text",
    }


PEERS = {
    "clip-retrieval": ("/knn-service", _clip_retrieval),
    "infinity": ("/embeddings", _infinity),
}


def asked(name: str, kind: str) -> Requests:
    """Return the requests to a peer, each with another text or image."""
    path, body = PEERS[name]
    queries: Iterator[str | bytes] = unique_texts(time.time_ns())
    if kind == "image":
        queries = (
            file + n.to_bytes(8, "big")
            for n, file in enumerate(itertools.cycle(images(16)))
        )
    return lambda: post(
        path,
        "application/json",
        json.dumps(body(next(queries))).encode(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in PEERS:
        parser.add_argument(
            f"--{name}",
            metavar="URL",
            help="address of the peer; default: skip it",
        )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("data/benchmarks"),
        help="folder of the index",
    )
    parser.add_argument(
        "--runtimes",
        nargs="+",
        default=["torch", "auto"],
        help="of this service, one after the other",
    )
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    index = random_vit(given.work)
    ports = {
        name: urlsplit(url).port
        for name in PEERS
        if (url := getattr(given, name.replace("-", "_")))
    }
    for runtime in given.runtimes:
        with serving(
            index,
            cache_size=0,
            runtime=runtime,
            deadline_ms=60_000,
        ) as server:
            for kind, mine in (
                ("text", lambda: new_texts(time.time_ns())),
                ("image", new_images),
            ):
                services = {f"dcar, {runtime}": (server.port, mine)}
                services |= {
                    name: (port, partial(asked, name, kind))
                    for name, port in ports.items()
                }
                for connections in (1, 8, 32):
                    tallies: dict[str, list[Tally]] = {name: [] for name in services}
                    for turn in range(given.rounds + 1):
                        for name, (port, make) in services.items():
                            tally = run(
                                closed_loop(
                                    port,
                                    make(),
                                    connections=connections,
                                    seconds=given.seconds,
                                )
                            )
                            if turn:  # the first warms up
                                tallies[name].append(tally)
                    for name, each in tallies.items():
                        print(
                            f"{kind:8} c={connections:2}  {name:20} {median(each)}",
                            flush=True,
                        )


if __name__ == "__main__":
    main()
