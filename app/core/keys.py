"""API keys, known to the service only by their hashes.

- A key has 256 random bits, so a plain SHA-256 cannot be reversed and no slow hash is needed.
- Hashes are compared in constant time and with every known key, so the response time reveals nothing.
- `dcar key NAME` makes a key for the caller and the line `NAME:HASH` for DCAR_API_KEYS.
- A scope may follow the hash, as in `NAME:HASH:write:shoes+bags`. A key without one reads every collection, and a key
  that may write may also read.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

_PREFIX = "dcar_"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HASH = re.compile(r"[0-9a-f]{64}")
_HASHED = "sha256:"
_SCOPE = re.compile(r"((?P<right>read|write)(:(?P<names>[A-Za-z0-9._+-]+))?)?")


@dataclass(frozen=True)
class ApiKey:
    """A key's hash and its scope. collections: the names of those it opens; None for all."""

    digest: str
    may_write: bool = False
    collections: frozenset[str] | None = None

    def opens(self, collection: str) -> bool:
        """Return True if the key may read a collection."""
        return self.collections is None or collection in self.collections


def new_key() -> str:
    """Return a new random key, such as dcar_3f.. (48 characters)."""
    return _PREFIX + secrets.token_urlsafe(32)


def key_hash(key: str) -> str:
    """Return the hash of a key: 64 hexadecimal digits."""
    return hashlib.sha256(key.encode()).hexdigest()


def parse_keys(text: str) -> dict[str, ApiKey]:
    """Return keys by name from NAME:HASH[:RIGHT[:COLLECTIONS]] entries, separated by commas or white space.

    Raises:
        ValueError: an entry is malformed, or a name is repeated. The message holds no hash.
    """
    keys: dict[str, ApiKey] = {}
    for entry in text.replace(",", " ").split():
        name, _, scope = entry.partition(":")
        digest, _, scope = scope.partition(":")
        if not _NAME.fullmatch(name) or not _HASH.fullmatch(digest.lower()):
            raise ValueError("must be NAME:HASH pairs, separated by commas, as `dcar key NAME` prints them")
        if name in keys:
            raise ValueError(f"has two keys named {name}")
        match = _SCOPE.fullmatch(scope)
        if match is None or entry.endswith(":"):
            raise ValueError(f"has a scope of {name} that is not read or write, as in {name}:HASH:write:shoes+bags")
        names = frozenset(match["names"].split("+")) if match["names"] else None
        keys[name] = ApiKey(digest.lower(), match["right"] == "write", names)
    if not keys:
        raise ValueError("has no key; leave it unset to serve everybody")
    return keys


def find_key_name(keys: Mapping[str, ApiKey], key: str) -> str | None:
    """Return the name of a key, None for an unknown key."""
    digest = key_hash(key).encode()
    match = None
    for name, known in keys.items():  # all of them, in constant time
        if hmac.compare_digest(digest, known.digest.encode()):
            match = name
    return match


def is_key(key: str, secret: str) -> bool:
    """Return True if `key` is the secret, which is given in plain text or as `sha256:HASH`."""
    digest = secret.removeprefix(_HASHED).lower() if secret.startswith(_HASHED) else key_hash(secret)
    return hmac.compare_digest(key_hash(key).encode(), digest.encode())


def key_in(headers: Mapping[str, str]) -> str | None:
    """Return the key of a request: `Authorization: Bearer KEY` or `X-API-Key: KEY`."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return headers.get("x-api-key") or None
