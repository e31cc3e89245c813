"""One process, two workers and two replicas under one load; the answers must be equal.

python benchmarks/scale.py
"""

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from load import closed_loop, text_request, unique_texts
from serve import median, new_texts, run
from service import Server, emoji, serving

from tests.support.servers import behind_nginx

CONNECTIONS = 16
TEXTS = list(itertools.islice(unique_texts(1), 300))


@contextmanager
def services(*each: dict[str, Any]) -> Iterator[tuple[int, list[Server]]]:
    """Services with these settings, several of them behind nginx; yield the port and
    the services.
    """
    with ExitStack() as stack:
        servers = [stack.enter_context(serving(**settings)) for settings in each]
        port = servers[0].port
        if len(servers) > 1:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            port = stack.enter_context(
                behind_nginx(folder, *(server.port for server in servers))
            )
        yield port, servers


def table(index: Path, seconds: float, rounds: int) -> bool:
    one = {"index": index}
    half = {"index": index, "threads": 1}
    with services(one), services(half):  # exports are made
        pass
    kinds = {
        "one process": services(one),
        "two workers": services(one | {"workers": 2}),
        "two replicas behind nginx": services(half, half),
    }
    expected = list[list[str]]()
    whole = True
    print("| | new texts/s | p99 ms | known texts/s | p99 ms | MB | answers |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | --- |")
    for name, start in kinds.items():
        with start as (port, servers):
            time.sleep(10)  # further workers load their model
            url = f"http://127.0.0.1:{port}/search/text"
            known = itertools.cycle(map(text_request, TEXTS))
            bodies = [
                httpx.post(url, json={"query": text}, timeout=60).json()
                for text in TEXTS[:50]
            ]
            found = [[each["id"] for each in body["results"]] for body in bodies]
            expected = expected or found
            cells = list[str]()
            for requests in (new_texts(5), known.__next__):
                load = partial(
                    closed_loop,
                    port,
                    requests,
                    connections=CONNECTIONS,
                    seconds=seconds,
                )
                # the first fills the caches
                loads = [run(load()) for _ in range(rounds + 1)][1:]
                whole &= all(
                    set(each.statuses) == {200} and not each.broken for each in loads
                )
                cells += [
                    f"{median(loads).rate:,.0f}",
                    f"{median(loads).percentile(99):.1f}",
                ]
            memory = sum(server.memory_mb(shared=True) for server in servers)
            whole &= found == expected
            same = f"{sum(map(list.__eq__, found, expected))} of {len(found)} equal"
            print(
                f"| {name} | {' | '.join(cells)} | {memory:,.0f} | {same} |", flush=True
            )
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--index",
        type=Path,
        help="take this index instead of the bundled emoji",
    )
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    index = given.index or emoji(Path("data/benchmarks"))
    sys.exit(0 if table(index, given.seconds, given.rounds) else 1)


if __name__ == "__main__":
    os.environ.setdefault("DCAR_DEVICE", "cpu")
    main()
