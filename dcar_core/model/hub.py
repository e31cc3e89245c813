"""Files of models from the Hugging Face hub, through its own client and cache.

- What is cached is used without asking the hub, so a service starts without it.
- Every failure is one `ModelError` that says what to do.
"""

import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dcar_core.util.errors import HubUnavailableError, ModelError
from dcar_core.util.files import DISK_ERRORS

TIMEOUT_S = 5.0


def fetch(repository: str, *names: str) -> Path | None:
    """Return the first of these files that a repository has, from the cache or downloaded; None if it has none.

    Raises:
        HubUnavailableError: it is not cached, and the hub cannot be reached.
        ModelError: the hub refuses, the connection breaks, or the disk is full.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    cached = [try_to_load_from_cache(repository, name) for name in names]
    if found := next((place for place in cached if isinstance(place, str)), None):
        return Path(found)
    if None not in cached:  # all are known to be missing
        return None
    if not hub_is_reachable():
        raise HubUnavailableError(
            f"{names[0]} of {repository} is not cached, and the model hub cannot be reached: connect this machine, "
            f"name a mirror by HF_ENDPOINT, or give a model's directory, such as --model examples/emoji/base"
        )
    for name in names:
        try:
            return Path(hf_hub_download(repository, name))
        except LocalEntryNotFoundError as error:  # the hub could not be asked
            reason = _reason(repository, error.__cause__ or error)
        except EntryNotFoundError:
            continue
        except Exception as error:  # of the HTTP library in use
            reason = _reason(repository, error)
        raise ModelError(f"{name} of {repository} {reason}") from None
    return None


def _reason(repository: str, error: BaseException) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        page = f"{constants.ENDPOINT}/{repository}"
        return f"is for accounts that accepted its terms: accept them at {page}, and set HF_TOKEN to your token"
    if isinstance(error, RepositoryNotFoundError):
        return "is not on the hub, or is private: correct the name, or set HF_TOKEN to a token that may read it"
    if isinstance(error, HfHubHTTPError):
        status, token = error.response.status_code, "set HF_TOKEN to a token that may read it"
        return f"cannot be read, the hub responds with {status}: {token if status in (401, 403) else 'try again later'}"
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return f"does not fit in {constants.HF_HUB_CACHE}: free space, or set HF_HOME to another disk"
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return f"could not be downloaded ({first}): run the same command again"


@contextmanager
def cache_only() -> Iterator[None]:
    """Let libraries find fetched files without asking the hub, which takes a minute where it is out of reach."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def hub_is_reachable() -> bool:
    """Return True if the model hub responds within a few seconds, also where names take long to resolve."""
    from huggingface_hub import constants

    found = threading.Event()

    def ask() -> None:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=TIMEOUT_S).close()
        except urllib.error.HTTPError as error:
            error.close()
        except (OSError, ValueError):
            return
        found.set()

    if constants.HF_HUB_OFFLINE:
        return False
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(TIMEOUT_S)
    return found.is_set()
