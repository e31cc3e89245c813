"""Check in seconds whether the model hub can be reached. Its own client tries for a minute."""

import os
import threading
import urllib.error
import urllib.request
from pathlib import Path

_HUB = "https://huggingface.co"
_TIMEOUT_S = 5.0


def prepare_hub(model: str, pretrained: str | None) -> bool:
    """Return True unless a model needs the hub and the hub cannot be reached; then load from the cache alone.

    Call it before the first import of open_clip. Only a tag of weights and an `hf-hub:` name need the hub.
    """
    is_tag = bool(pretrained) and pretrained != "random" and not Path(str(pretrained)).is_file()
    if Path(model).is_dir() or not (is_tag or model.startswith("hf-hub:")):
        return True
    is_online = hub_is_reachable()
    if not is_online:
        os.environ["HF_HUB_OFFLINE"] = "1"  # cached weights are found at once, without attempts to connect
    return is_online


def hub_is_reachable() -> bool:
    """Return True if the model hub responds within a few seconds, also where names take long to resolve."""
    found = threading.Event()

    def ask() -> None:
        request = urllib.request.Request(os.environ.get("HF_ENDPOINT", _HUB), method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=_TIMEOUT_S).close()
        except urllib.error.HTTPError as error:
            error.close()
        except (OSError, ValueError):
            return
        found.set()

    if os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("0", "", "false", "no"):
        return False
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_TIMEOUT_S)
    return found.is_set()
