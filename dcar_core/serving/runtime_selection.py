"""Choice of a runtime: by name, or the fastest that is right on this machine (`auto`).

- `auto` measures the installed runtimes once; the ranking is saved by processor, threads and library versions for every
  encoder on the backbone. `dcar benchmark` measures more, int8 included, and its ranking for one encoder comes first.
- At every start the runtime, also one chosen by name, must give the vectors of PyTorch in float32 on a small probe.
- `auto` skips a runtime that fails with one warning that names the reason; `torch` always remains.
"""

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dcar_core.runtimes.adapter import Adapter
from dcar_core.runtimes.equality_proof import Probe, prove, reference_vectors
from dcar_core.runtimes.export_cache import GRAPHS
from dcar_core.runtimes.protocol import Runtime
from dcar_core.runtimes.registry import AUTO, RUNTIME_KINDS, LoadedModel, open_runtime
from dcar_core.serving.runtime_trial import RuntimeTrial, measure_runtime
from dcar_core.util import machine
from dcar_core.util.errors import DcarError, RuntimeUnavailableError
from dcar_core.util.files import write_json

logger = logging.getLogger(__name__)

FALLBACK = "torch"
_LIBRARIES = ("torch", "openvino", "onnxruntime")
_PROOF_IMAGES = 2  # of a runtime chosen by name


@dataclass(frozen=True)
class Ranking:
    """Names of the runtimes that hold, best first; and the installed libraries."""

    names: tuple[str, ...]
    libraries: dict[str, str]
    trials: tuple[RuntimeTrial, ...]


def load_runtime(name: str, adapter: Adapter, loaded: LoadedModel, *, proven: bool = True) -> Runtime:
    """Open a runtime by name, or the best by `auto`, which never fails.

    proven: require a runtime chosen by name to give PyTorch's vectors; `auto` always does.

    Raises:
        RuntimeUnavailableError, MissingExtraError: the named runtime cannot be used here.
    """
    if name == AUTO:
        return _best(adapter, loaded)
    runtime = _opened(name, adapter, loaded)
    if proven:
        probe = Probe.synthetic(adapter.preprocess.size, _PROOF_IMAGES)
        proof = prove(adapter, runtime, probe, reference_vectors(loaded.model, probe))
        if not proof.holds:
            raise RuntimeUnavailableError(
                f"the runtime {name} cannot be used: its vectors are not those of float32 here: {proof}; "
                f"choose another, such as auto"
            )
    return runtime


def _opened(name: str, adapter: Adapter, loaded: LoadedModel) -> Runtime:
    """Open a runtime and run it with one row and with several, because some compile only then, or fail.

    Their libraries may raise errors of any kind.
    """
    try:
        runtime = open_runtime(name, loaded)
        for texts in (["a"], ["a", "a b", "a b c d e"]):
            adapter.encode_text(runtime, texts, len(texts))
            adapter.encode_pixels(runtime, np.stack([adapter.preprocess.blank()] * len(texts)))
    except DcarError:
        raise
    except Exception as error:
        raise RuntimeUnavailableError(f"the runtime {name} cannot be used: {reason_of(error)}") from error
    return runtime


def reason_of(error: Exception) -> str:
    if isinstance(error, DcarError):
        return str(error)
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def _best(adapter: Adapter, loaded: LoadedModel) -> Runtime:
    probe = Probe.synthetic(loaded.backbone.preprocess.size)
    expected = reference_vectors(loaded.model, probe)
    ranking = load_ranking(loaded) or measure_candidates(adapter, loaded, probe, candidates(loaded))
    for i, name in enumerate(ranking.names):
        following = ranking.names[i + 1] if i + 1 < len(ranking.names) else FALLBACK
        try:
            runtime = _opened(name, adapter, loaded)
            if (proof := prove(adapter, runtime, probe, expected)).holds:
                return runtime
            reason = f"its vectors are not those of float32 here: {proof}"
        except Exception as error:  # perhaps with a larger batch than the first
            reason = reason_of(error)
        if name != FALLBACK:
            logger.warning(
                "the runtime %s, the fastest here, is not used: %s; using %s instead", name, reason, following
            )
    return open_runtime(FALLBACK, loaded)


def candidates(loaded: LoadedModel) -> list[str]:
    """List what `auto` may try: nothing that needs data, compiles for minutes or is not installed."""
    installed = machine.installed_versions(_LIBRARIES)
    if loaded.backbone.device.type == "cuda":
        return ["torch", "cuda-fp16", "cuda-bf16"]
    if loaded.backbone.device.type != "cpu":
        return ["torch"]
    has_bf16 = machine.missing_instructions("bf16") is None
    names = ["torch", "torch-bf16"] if has_bf16 else ["torch"]
    if "openvino" in installed:
        names.append("openvino-bf16" if has_bf16 else "openvino")
    elif "onnxruntime" in installed:
        names.append("onnx")
    return names


def measure_candidates(adapter: Adapter, loaded: LoadedModel, probe: Probe, names: list[str]) -> Ranking:
    """Measure runtimes and save their ranking; unusable ones are left out with a warning."""
    logger.info("measuring %s, once for this model and machine", ", ".join(names))
    expected, trials = reference_vectors(loaded.model, probe), []
    for name in names:
        try:
            trials.append(measure_runtime(adapter, _opened(name, adapter, loaded), probe, expected))
        except Exception as error:
            logger.warning("the runtime %s is not tried: %s", name, reason_of(error))
    ranking = rank(trials)
    save_ranking(loaded, ranking)
    logger.info("runtimes here, best first: %s", ", ".join(ranking.names))
    return ranking


def rank(trials: Iterable[RuntimeTrial]) -> Ranking:
    """Sort trials, best first; names of runtimes with wrong vectors are left out."""
    ordered = tuple(sorted(trials, key=lambda trial: -trial.score))
    names = tuple(trial.name for trial in ordered if trial.holds)
    return Ranking(names, machine.installed_versions(_LIBRARIES), ordered)


def save_ranking(loaded: LoadedModel, ranking: Ranking, *, own: bool = False) -> None:
    """Save a ranking for later starts. own: for this encoder alone, because its recall was measured."""
    path = _path(loaded, loaded.fingerprint if own else "")
    content = {
        **_circumstances(),
        "libraries": ranking.libraries,
        "best_first": ranking.names,
        "trials": [asdict(trial) for trial in ranking.trials],
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content, shared=True)
    except OSError as error:
        logger.warning("the ranking of runtimes cannot be saved in %s: %s", path.parent, error.strerror or error)


def load_ranking(loaded: LoadedModel) -> Ranking | None:
    """Load an earlier ranking; None if circumstances have changed since."""
    for fingerprint in (loaded.fingerprint, ""):
        path = _path(loaded, fingerprint)
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            names = tuple(name for name in content["best_first"] if name in RUNTIME_KINDS)
            libraries = dict(content["libraries"])
            is_same = all(content.get(name) == value for name, value in _circumstances().items())
            trials = tuple(RuntimeTrial(**trial) for trial in content["trials"])
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s cannot be read (%s), so the runtimes are measured again", path, error)
            continue
        now = machine.installed_versions(_LIBRARIES)
        # A library that is gone keeps the ranking: its runtime is then skipped with a warning.
        if is_same and names and all(libraries.get(name) == now[name] for name in now):
            return Ranking(names, libraries, trials)
    return None


def _path(loaded: LoadedModel, fingerprint: str) -> Path:
    device = loaded.backbone.device.type
    name = f"{loaded.backbone_hash[:16]}_{loaded.inputs}_{device}_{torch.get_num_threads()}"
    return loaded.cache / "rankings" / (f"{name}_{fingerprint[:16]}.json" if fingerprint else f"{name}.json")


def _circumstances() -> dict[str, Any]:
    return {"graphs": GRAPHS, "processor": machine.processor_id(), "threads": torch.get_num_threads()}
