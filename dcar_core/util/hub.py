"""Files of the model hub: from the cache, without asking for them, or downloaded.

Cached files are used as they are, so a service starts without the hub.
"""

import logging
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dcar_core.util.errors import HubUnavailableError, ModelError

logger = logging.getLogger(__name__)

HUB = "hf-hub:"
TIMEOUT_S = 5.0  # of the hub
_LARGE = 1_000_000  # bytes of a download that is announced


def fetch(repository: str, *names: str) -> Path | None:
    """Return the first of these files that a repository has, from the cache or
    downloaded; None if it has none.

    Raises:
        HubUnavailableError: it is not cached, and the hub cannot be reached.
        ModelError: the hub refuses, the connection breaks, or the disk is full.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    cached = [try_to_load_from_cache(repository, name) for name in names]
    if file := next((path for path in cached if isinstance(path, str)), None):
        return Path(file)
    if None not in cached:  # all are known to be missing
        return None
    if not hub_is_reachable():
        raise HubUnavailableError(
            f"{names[0]} of {repository} is not cached, and the model hub cannot be"
            " reached: connect this machine, name a mirror by HF_ENDPOINT, or give a"
            " model's directory, such as --model examples/emoji/base"
        )
    for name in names:
        try:
            _announce(repository, name)
            return Path(hf_hub_download(repository, name))
        except Exception as error:  # of the HTTP library in use
            if isinstance(error, EntryNotFoundError) and not isinstance(
                error, LocalEntryNotFoundError
            ):
                continue
            reason = " ".join(str(error.__cause__ or error).split())
            raise ModelError(
                f"{name} of {repository} cannot be downloaded ({reason}): correct the"
                " name, set HF_TOKEN to a token that may read it, or run the same"
                " command again"
            ) from error
    return None


def _announce(repository: str, name: str) -> None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    with suppress(Exception):  # the download says what is wrong
        size = get_hf_file_metadata(hf_hub_url(repository, name)).size or 0
        if size >= _LARGE:
            logger.info("downloading %s of %s, %.0f MB", name, repository, size / 1e6)


@contextmanager
def cache_only() -> Iterator[None]:
    """Let libraries find fetched files without asking the hub, which takes a minute
    where it is out of reach.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def hub_is_reachable() -> bool:
    """Return whether the model hub responds; its own client would try for half a
    minute.
    """
    from huggingface_hub import constants

    try:
        if not constants.HF_HUB_OFFLINE:
            urllib.request.urlopen(
                urllib.request.Request(constants.ENDPOINT, method="HEAD"),
                timeout=TIMEOUT_S,
            ).close()
    except urllib.error.HTTPError as error:
        error.close()
    except (OSError, ValueError):
        return False
    return not constants.HF_HUB_OFFLINE
