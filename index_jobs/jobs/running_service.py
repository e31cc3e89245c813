"""The answers of a running service, of any release and format, by which a new index is
compared with the old one.
"""

import json
import os
import time
from http import HTTPStatus
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from dcar_core.data.judgements import JudgedList
from dcar_core.util.console import progress_bar
from dcar_core.util.errors import DataError, DcarError
from index_jobs.index.index_version import IndexVersion
from index_jobs.jobs.gate import find_pairs
from index_jobs.jobs.update import live_gallery

KEY = "DCAR_JUDGE_KEY"  # variable with the API key that the service asks for
# of a request; of one that the service's rate refuses
_TIMEOUT_S = 60
_ATTEMPTS = 30
_MAX_CHARS = 1000  # of a query, in a service with its defaults


def known_pairs(index: IndexVersion) -> JudgedList:
    """Return the captions that only one image has. Raise DataError if there are
    none.
    """
    pairs = find_pairs(live_gallery(index), None)
    judged = JudgedList()
    for text, item_id in zip(pairs.texts, pairs.ids, strict=True) if pairs else ():
        if text.strip() and len(text) <= _MAX_CHARS:
            judged.add({"query": text, "item_id": item_id, "grade": 1}, item_id)
    if not judged.texts:
        raise DataError(
            "the index has no captions to compare by; give a table of query, item_id"
            " and grade"
        )
    return judged


def ask_service(
    url: str,
    judged: JudgedList,
    **options: Any,
) -> tuple[str, dict[str, list[str]]]:
    """Return the service's name with its version, and the ids of the results by those
    of the queries.

    Args:
        url: of the service, or of one of its collections.
        options: of each search.

    Raises:
        DcarError: it does not answer.
    """
    key = os.environ.get(KEY)
    headers = {"Content-Type": "application/json"} | (
        {"Authorization": f"Bearer {key}"} if key else {}
    )
    results = dict[str, list[str]]()
    version = 0
    with progress_bar(len(judged.texts), "ask the service", "query") as bar:
        for query_id, text in judged.texts.items():
            query = json.dumps({"query": text} | options).encode()
            results[query_id], version = _ask(
                Request(f"{url.rstrip('/')}/search/text", query, headers)
            )
            bar.update()
    return f"{url} version {version}", results


def _ask(request: Request) -> tuple[list[str], int]:
    """Return the ids of the results, and the version that found them. Wait as a rate of
    the service asks for.
    """
    for _ in range(_ATTEMPTS):
        try:
            with urlopen(request, timeout=_TIMEOUT_S) as response:
                body = json.load(response)
            return [result["id"] for result in body["results"]], body["index_version"]
        except HTTPError as error:
            if error.code != HTTPStatus.TOO_MANY_REQUESTS:
                told = " ".join(error.read(300).decode(errors="replace").split())
                raise DcarError(
                    f"{request.full_url}: status {error.code}: {told}"
                ) from error
            wait = error.headers.get("Retry-After", "")  # a proxy may give a date
            time.sleep(int(wait) if wait.isdecimal() else 1)
        except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
            raise DcarError(
                f"{request.full_url} does not answer a search: {error}; name a running"
                " service"
            ) from error
    raise DcarError(
        f"{request.full_url}: its rate refused a query {_ATTEMPTS} times; raise it for"
        " this key"
    )
