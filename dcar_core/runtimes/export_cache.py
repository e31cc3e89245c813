"""Graphs on disk: made once for a backbone and a library's version, checked at every use.

    CACHE/exports/KEY/manifest.json    what it was made of, and the checksum of every file
    CACHE/exports/KEY/*.xml, *.bin, *.onnx, *.safetensors

- KEY names backbone, depth of the image prompts, library and version, so an upgrade exports anew beside the old one.
- Written aside and renamed, under a lock: a killed export leaves nothing that could be taken for a whole one.
- Nothing is a pickle: reading a cache never runs what somebody put there.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from dcar_core.util.errors import RuntimeUnavailableError
from dcar_core.util.files import apply_umask, sha256_of

MANIFEST = "manifest.json"
# Raised when the graphs change, so that what an older version of this package exported is not used.
GRAPHS = 1


def default_cache_directory() -> Path:
    """What DCAR_RUNTIME_CACHE says, for jobs, commands and the service alike; else the user's cache directory."""
    if named := os.environ.get("DCAR_RUNTIME_CACHE"):
        return Path(named)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "dcar"
    try:
        return Path.home() / ".cache" / "dcar"
    except RuntimeError:  # a user whom the system does not know, as in a container: there is no place that is theirs
        return Path(os.devnull) / "dcar"


@dataclass(frozen=True)
class ExportKey:
    """What an export is made of. fingerprint: of the encoder whose data calibrated it, empty for an exact one."""

    runtime: str
    backbone: str
    depth: int
    library: str
    fingerprint: str = ""

    def directory(self, cache: Path) -> Path:
        parts = [self.backbone[:16], f"d{self.depth}", self.runtime, self.library.replace(" ", "-")]
        return cache / "exports" / "_".join([*parts, self.fingerprint[:16]] if self.fingerprint else parts)

    def described(self) -> dict[str, object]:
        return {
            "graphs": GRAPHS,
            "runtime": self.runtime,
            "backbone": self.backbone,
            "depth": self.depth,
            "library": self.library,
            "fingerprint": self.fingerprint,
        }


def ensure_export(key: ExportKey, cache: Path, write: Callable[[Path], None] | None) -> Path:
    """The directory of a checked export; made with `write(directory)` when there is none.

    Args:
        write: None when it cannot be made here and now.

    Raises:
        RuntimeUnavailableError: it is corrupted, made of something else, cannot be made or cannot be written.
    """
    final = key.directory(cache)
    try:
        if not final.is_dir():
            if write is None:
                raise RuntimeUnavailableError(f"there is no export in {final}")
            final.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(final.with_name(final.name + ".lock")):
                for left in final.parent.glob(f"{final.name}.part-*"):  # by a process that was killed
                    shutil.rmtree(left, ignore_errors=True)
                if not final.is_dir():
                    _make(key, final, write)
        _check(key, final)
    except OSError as error:
        raise RuntimeUnavailableError(
            f"the cache of exports in {cache} cannot be used: {error.strerror or error}; name another directory"
        ) from error
    return final


def _make(key: ExportKey, final: Path, write: Callable[[Path], None]) -> None:
    aside = Path(tempfile.mkdtemp(prefix=final.name + ".part-", dir=final.parent))
    try:
        try:
            write(aside)
        except (RuntimeUnavailableError, OSError):
            raise
        except Exception as error:  # exporters raise what they like
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RuntimeUnavailableError(f"this model cannot be exported for {key.runtime}: {reason}") from error
        files = {path.name: sha256_of(path) for path in sorted(aside.iterdir())}
        (aside / MANIFEST).write_text(json.dumps({**key.described(), "files": files}, indent=2) + "\n")
        aside.chmod(apply_umask(0o777))  # a job's export serves the service, whose user may be another
        aside.rename(final)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _check(key: ExportKey, final: Path) -> None:
    remedy = f"delete {final} and it is made again"
    try:
        manifest = json.loads((final / MANIFEST).read_text(encoding="utf-8"))
        files: Mapping[str, str] = manifest["files"]
    except (ValueError, KeyError, TypeError, FileNotFoundError):
        raise RuntimeUnavailableError(f"the export in {final} has no readable {MANIFEST}; {remedy}") from None
    for name, wanted in key.described().items():
        if manifest.get(name) != wanted:
            raise RuntimeUnavailableError(
                f"the export in {final} is of {name} {_short(manifest.get(name))}, not {_short(wanted)}; {remedy}"
            )
    for name, checksum in files.items():
        if not (final / name).is_file() or sha256_of(final / name) != checksum:
            raise RuntimeUnavailableError(f"{final / name} is corrupted: its checksum is another; {remedy}")


def _short(value: object) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text
