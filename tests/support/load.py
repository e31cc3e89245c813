"""Searches without pause while something happens to the service."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx


@contextmanager
def searching(url: str) -> Iterator[list[int]]:
    """Search from a few threads, over new connections and kept ones; yield the statuses. -1: results are missing."""
    statuses, is_over = list[int](), threading.Event()

    def search(number: int) -> None:
        with httpx.Client(timeout=20) as client:
            while not is_over.is_set():
                send = client.post if number % 2 else httpx.post
                answer = send(f"{url}/search/text", json={"query": f"red {len(statuses)} {number}", "k": 5}, timeout=20)
                is_whole = answer.status_code != 200 or len(answer.json()["results"]) == 5
                statuses.append(answer.status_code if is_whole else -1)

    threads = [threading.Thread(target=search, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield statuses
    finally:
        is_over.set()
        for thread in threads:
            thread.join(30)
