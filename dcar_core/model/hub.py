"""Files of models from the Hugging Face hub, through its own client and cache.

- What is cached is used without asking the hub, so a service starts without it.
- Weights that were broken off resume where they ended, also in another process; the hub's client begins anew.
- Every failure is one `ModelError` that says what to do.
"""

import errno
import hashlib
import re
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from dcar_core.util.console import progress_bar
from dcar_core.util.errors import HubUnavailableError, ModelError
from dcar_core.util.files import DISK_ERRORS

_TIMEOUT_S = 5.0
_CONTENT_HASH = re.compile(r"[0-9a-f]{40,64}")  # an ETag that names the content


def fetch(repository: str, *names: str) -> Path | None:
    """Return the first of these files that a repository has, from the cache or downloaded; None if it has none.

    Raises:
        HubUnavailableError: it is not cached, and the hub cannot be reached.
        ModelError: the hub refuses, the connection breaks, or the disk is full.
    """
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    cached = [try_to_load_from_cache(repository, name) for name in names]
    for place in cached:
        if isinstance(place, str):
            return Path(place)
    if all(place is not None for place in cached):  # known to be missing
        return None
    if not hub_is_reachable():
        raise HubUnavailableError(
            f"{names[0]} of {repository} is not cached, and the model hub cannot be reached: connect this machine, "
            f"name a mirror by HF_ENDPOINT, or give a model's directory, such as --model examples/emoji/base"
        )
    for name in names:
        try:
            return _download(repository, name)
        except EntryNotFoundError:
            continue
        except GatedRepoError:
            page = f"{constants.ENDPOINT}/{repository}"
            reason = f"is for accounts that accepted its terms: accept them at {page}, and set HF_TOKEN to your token"
        except RepositoryNotFoundError:
            reason = "is not on the hub, or is private: correct the name, or set HF_TOKEN to a token that may read it"
        except HfHubHTTPError as error:
            status = error.response.status_code
            is_refused = status in (401, 403)
            remedy = "set HF_TOKEN to a token that may read it" if is_refused else "try again later"
            reason = f"cannot be read, the hub responds with {status}: {remedy}"
        except Exception as error:  # of the HTTP library in use
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                reason = f"does not fit in {constants.HF_HUB_CACHE}: free space, or set HF_HOME to another disk"
            else:
                first = (str(error).splitlines() or [type(error).__name__])[0]
                reason = f"could not be downloaded ({first}): run the same command again, it resumes"
        raise ModelError(f"{name} of {repository} {reason}") from None
    return None


def _download(repository: str, name: str) -> Path:
    """Download a file into the hub's cache, with a bar on stderr."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.file_download import http_get, repo_folder_name
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    url = hf_hub_url(repository, name)
    try:
        entry = get_hf_file_metadata(url)
    except EntryNotFoundError:
        return Path(hf_hub_download(repository, name))  # raises it as well, and remembers it in the cache
    if entry.size and _CONTENT_HASH.fullmatch(digest := entry.etag or ""):
        blobs = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repository, repo_type="model"), "blobs")
        blobs.mkdir(parents=True, exist_ok=True)
        part = blobs / f"{digest}.part"
        with FileLock(f"{part}.lock"), part.open("ab") as file:
            done = file.tell()
            if shutil.disk_usage(blobs).free < entry.size - done:
                raise OSError(errno.ENOSPC, "")
            with progress_bar(entry.size, name, "B", unit_scale=True, initial=done) as bar:
                http_get(
                    url, file, resume_size=done, headers=build_hf_headers(), expected_size=entry.size, _tqdm_bar=bar
                )
        if done and len(digest) == 64 and hashlib.sha256(part.read_bytes()).hexdigest() != digest:
            part.unlink()
            raise OSError("the resumed file was damaged")
        part.replace(blobs / digest)  # where the hub's client finds it
    return Path(hf_hub_download(repository, name))


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
            urllib.request.urlopen(request, timeout=_TIMEOUT_S).close()
        except urllib.error.HTTPError as error:
            error.close()
        except (OSError, ValueError):
            return
        found.set()

    if constants.HF_HUB_OFFLINE:
        return False
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_TIMEOUT_S)
    return found.is_set()
