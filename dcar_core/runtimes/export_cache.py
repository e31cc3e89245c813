"""Exported graphs on disk: made once for a backbone and a library's version, checked at every use.

    CACHE/exports/KEY/manifest.json    its key, and the checksum of every file
    CACHE/exports/KEY/*.xml, *.bin

- KEY names backbone, inputs of the graphs, library and version, so an upgrade exports again beside the old one.
- Exports are written aside and renamed under a lock, so a killed process leaves no half of one in place.
- Nothing is a pickle: reading a cache never runs code.
"""

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock

from dcar_core.util.errors import DcarError, RuntimeUnavailableError
from dcar_core.util.files import apply_umask, sha256_of

MANIFEST = "manifest.json"
GRAPHS = 4  # version of the graphs: exports of another one are not used


@dataclass(frozen=True)
class ExportKey:
    """Identity of an export.

    inputs: depth of the image prompts and of the text prompts, and "a" for adapters of blocks, such as d4t0a; the text
        depth is 0 where one graph serves every depth.
    fingerprint: of the encoder whose data calibrated it, empty for an exact export.
    """

    runtime: str
    backbone: str
    inputs: str
    library: str
    fingerprint: str = ""
    graphs: int = GRAPHS

    def directory(self, cache: Path) -> Path:
        parts = [self.backbone[:16], self.inputs, self.runtime, self.library.replace(" ", "-"), f"g{self.graphs}"]
        return cache / "exports" / "_".join([*parts, self.fingerprint[:16]] if self.fingerprint else parts)


def key_of_export(directory: Path) -> dict[str, object]:
    """Return the fields of an export's key, from its manifest."""
    content = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    return {name: value for name, value in content.items() if name != "files"}


def ensure_export(key: ExportKey, cache: Path, write: Callable[[Path], None] | None) -> Path:
    """Return the directory of a checked export; make it with `write(directory)`, if given, where there is none.

    Raise RuntimeUnavailableError if it is corrupted, has another key, or cannot be made or written.
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
        write(aside)
        files = {path.name: sha256_of(path) for path in sorted(aside.iterdir())}
        (aside / MANIFEST).write_text(json.dumps({**asdict(key), "files": files}, indent=2) + "\n")
        aside.chmod(apply_umask(0o777))  # an export made by a job also serves the service, run by another user
        aside.rename(final)
    except (DcarError, OSError):
        raise
    except Exception as error:  # exporters raise errors of any kind
        if "iostream error" in str(error):  # all that OpenVINO says of a write that fails
            raise OSError("an export cannot be written; perhaps the disk is full") from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RuntimeUnavailableError(f"this model cannot be exported for {key.runtime}: {reason}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _check(key: ExportKey, final: Path) -> None:
    remedy = f"delete {final} and it is made again"
    try:
        manifest = json.loads((final / MANIFEST).read_text(encoding="utf-8"))
        other = [name for name, expected in asdict(key).items() if manifest[name] != expected]
        corrupted = [name for name, checksum in manifest["files"].items() if sha256_of(final / name) != checksum]
    except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError) as error:
        raise RuntimeUnavailableError(f"the export in {final} is incomplete ({error!r}); {remedy}") from None
    if other:
        raise RuntimeUnavailableError(f"the export in {final} was made with other {', '.join(other)}; {remedy}")
    if corrupted:
        raise RuntimeUnavailableError(f"{final} is corrupted: {', '.join(corrupted)} changed; {remedy}")
