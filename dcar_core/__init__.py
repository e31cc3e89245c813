"""The method: what is learned, and how text and images become vectors. Knows no index
and no web.

`Encoder` is the interface for the other packages; it is imported on first use, so other
imports stay quick.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dcar_core.encoder.encoder import Encoder

__all__ = ["Encoder"]


def __getattr__(name: str) -> Any:
    if name == "Encoder":
        from dcar_core.encoder.encoder import Encoder

        return Encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
