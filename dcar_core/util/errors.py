"""Every error that this project raises on purpose. A message says what happened and
what to do.
"""

import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path

# names in a message, names of fields, characters of one
_SHOWN = 5
_SHOWN_FIELDS = 40
_SHOWN_CHARS = 80


class DcarError(Exception):
    """Base of the tree. `exit_code` is the status of a command that the error ends:
    docs/reference/exit-codes.md.
    """

    exit_code = 1


class DataError(DcarError):
    """Annotations or a gallery cannot be used."""

    exit_code = 3


class ImageFault(StrEnum):
    """Why an image cannot be read. Stored in vector shards and `failed.jsonl`, so the
    values are stable.
    """

    MISSING = "missing"  # no such file, tar member or URL
    # the bytes cannot be read now; a later attempt may succeed
    UNREADABLE = "unreadable"
    EMPTY = "empty"
    NOT_AN_IMAGE = "not_an_image"  # no known image format
    UNSUPPORTED = "unsupported"  # a known format that is not accepted
    # a known format whose optional decoder is not installed
    MISSING_DECODER = "missing_decoder"
    TOO_LARGE = "too_large"
    BROKEN = "broken"  # truncated or damaged
    # a structure that would cost far more to decode than its size suggests
    HOSTILE = "hostile"


class ImageError(DataError):
    """One image cannot be read. The message is the reason without the image's name."""

    def __init__(self, reason: str, fault: ImageFault = ImageFault.BROKEN) -> None:
        super().__init__(reason)
        self.fault = fault

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, ImageFault]]:
        return type(self), (str(self), self.fault)


class ModelError(DcarError):
    """The backbone is unknown, unsupported or cannot be loaded."""

    exit_code = 4


class HubUnavailableError(ModelError):
    """The model hub cannot be reached, and its files are not cached."""


class RuntimeUnavailableError(ModelError):
    """An encoder runtime is unavailable, or its cached export is unusable. The message
    is the reason.
    """


class CheckpointError(DcarError):
    """The checkpoint is missing, broken or belongs to another backbone."""

    exit_code = 4


class DivergedError(DcarError):
    """The loss of a training, or a vector, is not finite."""


class ArtifactError(DcarError):
    """A published index is missing, incomplete or corrupted."""


class StoreUnavailableError(ArtifactError):
    """The vector store does not respond. A later attempt may succeed."""


class GateError(DcarError):
    """A rebuilt index ranks worse than the served one."""

    exit_code = 6


class GalleryShrunkError(DcarError):
    """Too many of the served index's images are gone from the gallery."""

    exit_code = 7


class LockedError(DcarError):
    """Another process works on the same index, queue or output file."""

    exit_code = 5


class MissingExtraError(DcarError):
    """An optional dependency is not installed."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(
            f"{feature} needs an optional dependency: {install_command(extra)}"
        )


def install_command(extra: str) -> str:
    """Return the command that adds an extra to the environment of this process, from
    any directory.

    pip takes the installed version of this package, in whatever way it came, and asks a
    registry for the rest alone.
    """
    checkout = Path(__file__).parents[2]
    if Path(sys.prefix) == checkout / ".venv":
        is_here = Path.cwd() == checkout
        folder = "" if is_here else f"-C {shlex.quote(str(checkout))} "
        return f"make {folder}install EXTRAS={extra}"
    python = shlex.quote(sys.executable)
    # environments of uv have none
    pip = "" if find_spec("pip") else f"{python} -m ensurepip && "
    return f"{pip}{python} -m pip install 'dcar[{extra}]'"


@contextmanager
def requires_pytorch(feature: str) -> Iterator[None]:
    """Raise MissingExtraError if the body imports PyTorch, timm or open_clip and it is
    not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in (
            "torch",
            "torchvision",
            "timm",
            "open_clip",
        ):
            raise
        raise MissingExtraError(feature, "torch") from None


def is_panic(error: BaseException) -> bool:
    """Return whether a library in Rust panicked. Its exception is not an Exception, and
    cannot be imported.
    """
    return type(error).__name__ == "PanicException"


def shorten(names: Sequence[str], shown: int = _SHOWN) -> str:
    """Return the first names and the number of the others: "a, b, c and 4 more"."""
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest:,} more" if rest > 0 else "")


def list_fields(names: Iterable[str]) -> str:
    """Return names of fields for a message, in alphabetical order; long lists and long
    names are cut.
    """
    return shorten([name[:_SHOWN_CHARS] for name in sorted(names)], _SHOWN_FIELDS)
