"""The cost of serving a trained method: bytes for each domain, a shared backbone or its own, work on the gallery."""

from typing import Any

from dcar_core.model.dcar import DCAR


def serving_cost(model: DCAR) -> dict[str, Any]:
    """Return the cost of one more domain.

    Returns:
        bytes: of the parameters that serving needs. backbone: "shared" with other domains or "own".
        gallery: after a training, "unchanged", "matrix product" over its frozen features, or "encode again".
    """
    if model.changes is not None:
        tensors = list(model.backbone.clip.state_dict().values())
    else:
        tensors = [p for _, p in model.served()]
    again = "unchanged" if model.image_adapter is None else "matrix product"
    return {
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "backbone": "shared" if model.changes is None else "own",
        "gallery": again if model.image_is_frozen else "encode again",
    }
