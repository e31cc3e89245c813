"""Choice of a runtime: by name, or by a rule from what is installed and what the processor has (`auto`).

- Whatever is chosen must give the vectors of PyTorch in float32 on a small probe, at every start.
- `auto` passes over a runtime that fails, with one warning that names the reason; `torch` always remains.
"""

import logging
from itertools import pairwise

import numpy as np

from dcar_core.model.backbone import Backbone
from dcar_core.runtimes.encoder_state import EncoderState
from dcar_core.runtimes.equality_proof import Probe, Proof, prove, reference_vectors
from dcar_core.runtimes.protocol import Runtime
from dcar_core.runtimes.registry import AUTO, LoadedModel, open_runtime
from dcar_core.util import machine
from dcar_core.util.errors import DcarError, RuntimeUnavailableError

logger = logging.getLogger(__name__)

LARGE = 50_000_000  # parameters, from which PyTorch is faster in bfloat16 than in float32


def preferred_runtimes(backbone: Backbone) -> list[str]:
    """Return what `auto` tries for a model, in this order; nothing that needs data or is not installed.

    docs/explanation/runtimes.md has the measurements behind the rule.
    """
    device, names = backbone.device.type, ["torch"]
    if device == "cuda":
        names.insert(0, "cuda-fp16")
    elif device == "cpu":
        has_bf16 = machine.missing_instructions("bf16") is None
        if has_bf16 and sum(weight.numel() for weight in backbone.parameters()) >= LARGE:
            names.insert(0, "torch-bf16")
        if "openvino" in machine.installed_versions(["openvino"]):
            names.insert(0, "openvino-bf16" if has_bf16 else "openvino")
    return names


def load_runtime(name: str, state: EncoderState, loaded: LoadedModel, *, proven: bool = True) -> Runtime:
    """Open a runtime by name, or the first that can be used by `auto`, which never fails.

    proven: require a runtime chosen by name to give PyTorch's vectors; `auto` always does.

    Raises:
        RuntimeUnavailableError, MissingExtraError: the named runtime cannot be used here.
    """
    if name != AUTO:
        runtime = _open(name, state, loaded)
        if proven and not (proof := _prove(runtime, state, loaded)).holds:
            raise RuntimeUnavailableError(
                f"the runtime {name} cannot be used: its vectors are not those of float32 here: {proof}; "
                f"choose another, such as auto"
            )
        return runtime
    names = preferred_runtimes(loaded.backbone)
    for each, following in pairwise(names):
        try:
            runtime = _open(each, state, loaded)
            if (proof := _prove(runtime, state, loaded)).holds:
                return runtime
            reason = f"its vectors are not those of float32 here: {proof}"
        except Exception as error:  # perhaps with a larger batch than the first
            reason = reason_of(error)
        logger.warning("the runtime %s is not used: %s; using %s instead", each, reason, following)
    return open_runtime(names[-1], loaded)


def _open(name: str, state: EncoderState, loaded: LoadedModel) -> Runtime:
    """Open a runtime and run it with one row and with several, because some compile only then, or fail.

    Their libraries may raise errors of any kind.
    """
    try:
        runtime = open_runtime(name, loaded)
        for texts in (["a"], ["a", "a b", "a b c d e"]):
            state.encode_text(runtime, texts, len(texts))
            state.encode_pixels(runtime, np.stack([state.preprocess.blank()] * len(texts)))
    except DcarError:
        raise
    except Exception as error:
        raise RuntimeUnavailableError(f"the runtime {name} cannot be used: {reason_of(error)}") from error
    return runtime


def _prove(runtime: Runtime, state: EncoderState, loaded: LoadedModel) -> Proof:
    probe = Probe.synthetic(state.preprocess.size)
    return prove(state, runtime, probe, reference_vectors(loaded.model, probe))


def reason_of(error: Exception) -> str:
    """Return the message of our own errors, and the first line of a library's."""
    if isinstance(error, DcarError):
        return str(error)
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]
