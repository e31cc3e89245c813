"""The portable export of a checkpoint, by which it is served without PyTorch on any processor: see `encoder_cache`."""

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from dcar_core.model.checkpoint import PORTABLE
from dcar_core.runtimes.openvino_runtime import OpenVinoRuntime
from dcar_core.serving.encoder import Encoder
from dcar_core.serving.encoder_cache import ENTRY, LoadRequest
from dcar_core.util.errors import MissingExtraError, RuntimeUnavailableError
from dcar_core.util.files import default_cache_directory, link_or_copy

if TYPE_CHECKING:
    from dcar_core.model.backbone import Backbone

logger = logging.getLogger(__name__)


def add_portable_export(checkpoint: Path, backbone: "Backbone | None" = None) -> None:
    """Put an export into a checkpoint, once its vectors are those of PyTorch. A model without one is a warning.

    Args:
        backbone: of the checkpoint, if it is in memory; one on the CPU saves a second copy.
    """
    request = LoadRequest(checkpoint, "cpu", "openvino", None, default_cache_directory())
    shared = backbone if backbone is not None and backbone.device.type == "cpu" else None
    shutil.rmtree(checkpoint / PORTABLE, ignore_errors=True)  # of another release
    try:
        encoder = Encoder.load(checkpoint, device=request.device, runtime=request.runtime, backbone=shared)
        assert isinstance(encoder.runtime, OpenVinoRuntime)
        entry = request.file(encoder.fingerprint)
        if not entry.is_file():
            raise RuntimeUnavailableError(f"{entry.parent} cannot be written")
        (checkpoint / PORTABLE).mkdir()
        link_or_copy(entry, checkpoint / PORTABLE / ENTRY)
        for path in encoder.runtime.directory.iterdir():
            link_or_copy(path, checkpoint / PORTABLE / path.name)
    except (RuntimeUnavailableError, MissingExtraError) as error:
        logger.warning("services of this model will need PyTorch: %s", error)
