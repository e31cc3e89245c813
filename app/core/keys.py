"""Who may ask: keys, of which the service knows only hashes.

- A key has 256 random bits, so a plain SHA-256 of it cannot be turned back, and no slow hash is needed.
- Hashes are compared in constant time, and with every key that there is: how long it takes tells nothing.
- `dcar key NAME` makes one: the key is for the caller, the line `NAME:HASH` for DCAR_API_KEYS.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping

_PREFIX = "dcar_"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HASH = re.compile(r"[0-9a-f]{64}")
_HASHED = "sha256:"


def new_key() -> str:
    """A fresh key, such as dcar_3f.. (48 characters)."""
    return _PREFIX + secrets.token_urlsafe(32)


def key_hash(key: str) -> str:
    """What the service is told of a key: 64 hexadecimal digits."""
    return hashlib.sha256(key.encode()).hexdigest()


def parse_keys(text: str) -> dict[str, str]:
    """NAME:HASH, separated by commas or white space, as a table.

    Raises:
        ValueError: something is no such pair, or a name comes twice. The message holds no hash.
    """
    keys: dict[str, str] = {}
    for entry in text.replace(",", " ").split():
        name, _, digest = entry.partition(":")
        if not _NAME.fullmatch(name) or not _HASH.fullmatch(digest.lower()):
            raise ValueError("must be NAME:HASH, separated by commas, as `dcar key NAME` prints it")
        if name in keys:
            raise ValueError(f"has two keys named {name}")
        keys[name] = digest.lower()
    if not keys:
        raise ValueError("names no key; leave it out to let everybody search")
    return keys


def holder(keys: Mapping[str, str], given: str) -> str | None:
    """The name under which a key is known, None for a key that is not."""
    digest = key_hash(given).encode()
    found = None
    for name, known in keys.items():
        if hmac.compare_digest(digest, known.encode()):
            found = name
    return found


def is_key(given: str, wanted: str) -> bool:
    """Whether the key is the wanted one, which is given as it is or as `sha256:HASH`."""
    digest = wanted.removeprefix(_HASHED).lower() if wanted.startswith(_HASHED) else key_hash(wanted)
    return hmac.compare_digest(key_hash(given).encode(), digest.encode())


def given_key(headers: Mapping[str, str]) -> str | None:
    """The key that a request carries: `Authorization: Bearer KEY` or `X-API-Key: KEY`."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return headers.get("x-api-key") or None
