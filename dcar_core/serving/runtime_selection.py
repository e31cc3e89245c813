"""`auto`: the fastest runtime that is right on this machine. It measures, and does not guess.

- The first time, what is installed and can be had without the user's data is exported and measured, and the ranking is
  remembered by processor, threads and library versions, for every encoder on the backbone. `dcar benchmark` measures
  more, and what it finds is remembered for its encoder alone and comes first; only there can int8 enter, since it
  must also keep the recall.
- At every start the chosen one must still give the vectors of PyTorch in float32, on a small probe.
- What cannot be used any more is skipped with one warning that names the reason; `torch` is always left.
"""

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dcar_core.runtimes.adapter import Adapter
from dcar_core.runtimes.equality_proof import Probe, prove, reference_vectors
from dcar_core.runtimes.export_cache import GRAPHS
from dcar_core.runtimes.protocol import Runtime
from dcar_core.runtimes.registry import AUTO, RUNTIME_KINDS, LoadedModel, open_runtime
from dcar_core.serving import adapter_cache
from dcar_core.serving.runtime_trial import RuntimeTrial, measure_runtime
from dcar_core.util import cpu_features
from dcar_core.util.errors import DcarError, MissingExtraError, RuntimeUnavailableError
from dcar_core.util.files import write_json

log = logging.getLogger(__name__)

_LIBRARIES = ("torch", "openvino", "onnxruntime")
FALLBACK = "torch"


@dataclass(frozen=True)
class Ranking:
    """Runtimes, best first, without those that were wrong, and the libraries that were there."""

    names: tuple[str, ...]
    libraries: dict[str, str]
    trials: tuple[RuntimeTrial, ...]


def load_runtime(name: str, adapter: Adapter, loaded: LoadedModel) -> Runtime:
    """A runtime by name, or the best by `auto`. adapter: what `extract` makes of the loaded's model.

    Raises:
        RuntimeUnavailableError, MissingExtraError: one that was asked for by name cannot be had; never for `auto`.
    """
    return _opened(name, adapter, loaded) if name != AUTO else _best(adapter, loaded)


def _opened(name: str, adapter: Adapter, loaded: LoadedModel) -> Runtime:
    """A runtime whose towers have run, with one row and with several: some compile only then, or fail.

    They may fail with whatever their library raises.
    """
    try:
        runtime = open_runtime(name, loaded)
        for texts in (["a"], ["a", "a b", "a b c d e"]):
            adapter.encode_text(runtime, texts, len(texts))
            adapter.encode_pixels(runtime, np.stack([adapter.preprocess.blank()] * len(texts)))
    except DcarError:
        raise
    except Exception as error:
        raise RuntimeUnavailableError(f"the runtime {name} cannot be used: {_said(error)}") from error
    return runtime


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _best(adapter: Adapter, loaded: LoadedModel) -> Runtime:
    probe = Probe.synthetic(loaded.backbone.preprocess.size)
    wanted = reference_vectors(loaded.model, probe)
    ranking = load_ranking(loaded) or measure(adapter, loaded, probe, candidates(loaded))
    for i, name in enumerate(ranking.names):
        following = ranking.names[i + 1] if i + 1 < len(ranking.names) else FALLBACK
        try:
            runtime = _opened(name, adapter, loaded)
            if (proof := prove(adapter, runtime, probe, wanted)).holds:
                return runtime
            reason = f"its vectors are not those of float32 here: {proof}"
        except DcarError as error:
            reason = str(error)
        except Exception as error:  # of a larger batch than the first
            reason = _said(error)
        if name != FALLBACK:
            log.warning("the runtime %s, the fastest here, is not used: %s; using %s instead", name, reason, following)
    return open_runtime(FALLBACK, loaded)


def candidates(loaded: LoadedModel) -> list[str]:
    """What `auto` may try by itself: no int8, nothing that compiles for minutes, nothing that is not installed."""
    installed = cpu_features.installed_versions(_LIBRARIES)
    if loaded.backbone.device.type == "cuda":
        return ["torch", "cuda-fp16", "cuda-bf16"]
    if loaded.backbone.device.type != "cpu":
        return ["torch"]
    fast = cpu_features.missing_instructions("bf16") is None
    names = ["torch", "torch-bf16"] if fast else ["torch"]
    if "openvino" in installed:
        names.append("openvino-bf16" if fast else "openvino")
    elif "onnxruntime" in installed:
        names.append("onnx")
    return names


def measure(adapter: Adapter, loaded: LoadedModel, probe: Probe, names: Iterable[str]) -> Ranking:
    """Try runtimes out and remember their ranking; what cannot be had is left out, with a warning."""
    names = list(names)
    log.info("measuring %s, once for this model and machine", ", ".join(names))
    wanted, trials = reference_vectors(loaded.model, probe), []
    for name in names:
        try:
            trials.append(measure_runtime(adapter, _opened(name, adapter, loaded), probe, wanted))
        except MissingExtraError as error:
            log.info("the runtime %s is not tried: %s", name, error)
        except DcarError as error:
            log.warning("the runtime %s is not tried: %s", name, error)
        except Exception as error:
            log.warning("the runtime %s is not used: %s", name, _said(error))
    ranking = rank(trials)
    save_ranking(loaded, ranking)
    log.info("runtimes here, best first: %s", ", ".join(ranking.names))
    return ranking


def rank(trials: Iterable[RuntimeTrial]) -> Ranking:
    """Best first; those whose vectors are wrong are left out."""
    kept = tuple(sorted(trials, key=lambda trial: -trial.score))
    return Ranking(
        tuple(trial.name for trial in kept if trial.holds), cpu_features.installed_versions(_LIBRARIES), kept
    )


def save_ranking(loaded: LoadedModel, ranking: Ranking, *, own: bool = False) -> None:
    """Write a ranking for later starts; a cache that cannot be written costs them the measuring, nothing else.

    Args:
        own: for this encoder alone, whatever holds for others on its backbone: its recall was measured.
    """
    adapter_cache.discard(loaded.cache, loaded.backbone_hash)  # by the ranking before this one
    path = _path(loaded, loaded.fingerprint if own else "")
    content = {
        **_circumstances(),
        "libraries": ranking.libraries,
        "best_first": ranking.names,
        "trials": [trial.to_dict() for trial in ranking.trials],
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content, shared=True)
    except OSError as error:
        log.warning("what was measured cannot be remembered in %s: %s", path.parent, error.strerror or error)


def load_ranking(loaded: LoadedModel) -> Ranking | None:
    """What an earlier start or `dcar benchmark` measured here; None when circumstances have changed since."""
    for fingerprint in (loaded.fingerprint, ""):
        path = _path(loaded, fingerprint)
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            names = tuple(name for name in content["best_first"] if name in RUNTIME_KINDS)
            libraries = dict(content["libraries"])
            same = all(content.get(name) == value for name, value in _circumstances().items())
            trials = tuple(RuntimeTrial(**trial) for trial in content["trials"])
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s cannot be read (%s), so the runtimes are measured again", path, error)
            continue
        now = cpu_features.installed_versions(_LIBRARIES)
        # A library that is gone keeps the ranking: its runtime is then skipped with a warning.
        if same and names and all(libraries.get(name) == now[name] for name in now):
            return Ranking(names, libraries, trials)
    return None


def _path(loaded: LoadedModel, fingerprint: str) -> Path:
    device = loaded.backbone.device.type
    name = f"{loaded.backbone_hash[:16]}_d{loaded.depth}_{device}_{torch.get_num_threads()}"
    return loaded.cache / "rankings" / (f"{name}_{fingerprint[:16]}.json" if fingerprint else f"{name}.json")


def _circumstances() -> dict[str, Any]:
    return {"graphs": GRAPHS, "processor": cpu_features.processor_id(), "threads": torch.get_num_threads()}
