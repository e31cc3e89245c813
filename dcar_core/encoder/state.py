"""A runtime, which runs the two frozen towers, and the arrays that one checkpoint adds
to them. Needs no PyTorch.

texts -> tokens and weights -> runtime.text  -> normalize -> text adapter  -> vectors
pixels ----------------------> runtime.image -> normalize -> image adapter -> vectors

A runtime belongs to a backbone and the kinds of inputs beside it, and knows no encoder:
rows of several encoders share a pass where their inputs have one shape, and get the
vectors that each encoder gives alone.

Letters: V tokens of the vocabulary, A an adapter's inner width, S side in pixels;
others as in `encoder.graphs`.
"""

import hashlib
import sys
import threading
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController

from dcar_core.model.config import ModelConfig, ReweightConfig
from dcar_core.model.preprocess import Preprocess
from dcar_core.model.tokenizer import TextLayout, TextTokenizer
from dcar_core.util.arrays import Floats, Pixels, Rows, TokenIds
from dcar_core.util.errors import ModelError, RuntimeUnavailableError, install_command

_CHUNK = 4096  # tokens of the vocabulary
# of a forward pass before its first token, in tokens; on a ViT-B/32 with AMX a fifth
# faster than 32
PASS_COST = 128
# found now, since later it would search more libraries
_NUMPY_THREADS = ThreadpoolController()

# Of OpenVINO: one request at a time on all cores.
OPENVINO_OPTIONS = {
    "INFERENCE_PRECISION_HINT": "f32",
    "PERFORMANCE_HINT": "LATENCY",
    "NUM_STREAMS": "1",
}
RunGraph = Callable[[tuple[Any, ...]], Floats]


class Runtime:
    """Both towers. Several threads may use it at once. run_text, run_image: run a
    tower's graph over its inputs.
    """

    def __init__(self, name: str, run_text: RunGraph, run_image: RunGraph) -> None:
        self.name = name
        self._run_text = run_text
        self._run_image = run_image

    def text(
        self,
        tokens: TokenIds,
        weights: Floats,
        inputs: tuple[Floats, ...],
    ) -> Floats:
        """tokens (B, n) without the skipped ones, weights (B, n), `text_inputs` -> (B,
        E), not normalized.
        """
        return self._run_text((tokens, weights, *inputs))

    def image(self, pixels: Pixels, inputs: tuple[Floats, ...]) -> Floats:
        """pixels (B, 3, S, S), `image_inputs` of one or of B encoders -> (B, E), not
        normalized.
        """
        return self._run_image((pixels, *inputs))

    def encode_texts(
        self,
        texts: Sequence[tuple["EncoderState", str]],
        batch_size: int = sys.maxsize,
    ) -> Floats:
        """Encode each text with its own state -> (n, E), L2-normalized; at most
        `batch_size` in a pass, by length.
        """
        out = np.empty((len(texts), texts[0][0].dim), np.float32)
        for rows in _grouped(
            texts, lambda state: tuple(values.shape for values in state.text_inputs)
        ):
            state = texts[rows[0]][0]
            # [m, n]; prompts of one shape leave the same room
            tokens = state.tokens([texts[row][1] for row in rows])
            weights = np.empty(tokens.shape, np.float32)
            lengths = state.layout.lengths(tokens)
            for same in _grouped([texts[row] for row in rows], id):
                weights[same] = texts[rows[same[0]]][0].query_weights(tokens[same])
            if state.layout.reads_padding:
                lengths[:] = tokens.shape[1]
            for part in group_by_length(lengths, batch_size):
                chosen = [rows[i] for i in part]
                inputs = _join([texts[row][0].text_inputs for row in chosen])
                seen = slice(state.skipped, int(lengths[part[-1]]))
                out[chosen] = normalize(
                    self.text(tokens[part, seen], weights[part, seen], inputs)
                )
        for rows in _grouped(texts, id):
            out[rows] = texts[rows[0]][0].adapt_texts(out[rows])
        return out

    def encode_images(self, images: Sequence[tuple["EncoderState", Pixels]]) -> Floats:
        """Encode images, uint8 (3, S, S), each with its own state -> (n, E),
        L2-normalized.
        """
        out = np.empty((len(images), images[0][0].dim), np.float32)
        for rows in _grouped(
            images, lambda state: tuple(values.shape for values in state.image_inputs)
        ):
            inputs = _join([images[row][0].image_inputs for row in rows])
            out[rows] = normalize(
                self.image(np.stack([images[row][1] for row in rows]), inputs)
            )
        for rows in _grouped(images, id):
            out[rows] = images[rows[0]][0].adapt_images(out[rows])
        return out


def openvino_library() -> Any:
    """Import OpenVINO, without telemetry that would take the cores; or raise
    RuntimeUnavailableError.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type] # as if it were not installed
    try:
        import openvino
    except ImportError:
        remedy = f"the runtime torch needs none: {install_command('torch')}"
        raise RuntimeUnavailableError(f"OpenVINO is not installed; {remedy}") from None
    return openvino


class OpenVinoRuntime(Runtime):
    """Both graphs, compiled; needs neither the model nor PyTorch.

    graphs: of texts and of images, as files or models. directory: of their weights.
    hint: "f32" or "bf16".
    """

    def __init__(
        self,
        name: str,
        graphs: tuple[Any, Any],
        directory: Path,
        *,
        hint: str,
        threads: int,
    ) -> None:
        core = openvino_library().Core()
        self.directory = directory
        config = OPENVINO_OPTIONS | {
            "INFERENCE_PRECISION_HINT": hint,
            "INFERENCE_NUM_THREADS": str(threads),
        }
        try:
            with ThreadPoolExecutor(2) as pool:  # each takes one core for half a second
                compiled = list(
                    pool.map(
                        lambda graph: core.compile_model(graph, "CPU", config), graphs
                    )
                )
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise RuntimeUnavailableError(
                f"OpenVINO cannot compile the model in {directory}: {reason}"
            ) from error
        turn = threading.Lock()
        super().__init__(name, *(partial(_run, graph, turn) for graph in compiled))


def _run(graph: Any, turn: threading.Lock, inputs: tuple[Any, ...]) -> Floats:
    with turn:
        result: Floats = graph(list(inputs))[0]
        # the library writes into this memory again at the next call
        return result.copy()


@dataclass(frozen=True, eq=False)
class FeatureAdapterArrays:
    """`model.dcar.FeatureAdapter` as arrays. down: (A, E), down_bias: (A,), up: (E, A),
    up_bias: (E,).
    """

    down: Floats
    down_bias: Floats
    up: Floats
    up_bias: Floats

    def __call__(self, features: Floats) -> Floats:
        """(n, E) -> (n, E), normalized; in one thread, since others would wait busily
        and take the towers' cores.
        """
        with _NUMPY_THREADS.limit(limits=1, user_api="blas"):
            inner = np.maximum(features @ self.down.T + self.down_bias, 0)
            return normalize(features + inner @ self.up.T + self.up_bias)


@dataclass(frozen=True, eq=False)
class EncoderState:
    """One model's prompts, token weights and feature adapters, and what else a query
    needs beside a runtime.

    image_key: hash of what `image_features` depend on: the backbone, and what
    `image_inputs` are made of. dim: E. scale: 1 / tau of the backbone. patch_grid: of
    the image tower, patches per side. reranks: True if the model has a second stage,
    which scores first results again. tokenizer: its limit leaves room for the prompts.
    text_inputs: of the text graph after the weights: keys and values (D, 1, H, p, d) of
    start tokens and prompts, or
        prompts (depth, 1, k, W_t), or nothing. skipped: start tokens that they stand
        for; captions come without them.
    image_inputs: of the image graph after the pixels, as far as there are any: prompts
        (depth, 1, k, W_v), and the matrices of the blocks' adapters, two of (D, 1, r,
        W_v).
    token_factors: (V,), a query's weight of each token; None where all are 1.
    """

    fingerprint: str
    image_key: str
    dim: int
    scale: float
    patch_grid: int
    reranks: bool
    preprocess: Preprocess
    tokenizer: TextTokenizer
    layout: TextLayout
    text_inputs: tuple[Floats, ...]
    skipped: int
    image_inputs: tuple[Floats, ...]
    token_factors: Floats | None
    text_adapter: FeatureAdapterArrays | None
    image_adapter: FeatureAdapterArrays | None

    def tokens(self, texts: Sequence[str]) -> TokenIds:
        """Return int64 (n, L) with start tokens; of the whole context where the tower
        reads its padding.
        """
        tokens = self.tokenizer(texts)
        if self.layout.reads_padding:
            missing = self.tokenizer.limit - tokens.shape[1]
        else:
            missing = 0
        if missing:
            return np.pad(
                tokens,
                ((0, 0), (0, missing)),
                constant_values=self.layout.pad_id,
            )
        return tokens

    def query_weights(self, tokens: TokenIds) -> Floats:
        """Return the factors (n, L) of a query's tokens; 1 for start, end and
        padding.
        """
        if self.token_factors is None:
            return np.ones(tokens.shape, np.float32)
        return np.where(
            self.layout.caption_mask(tokens),
            self.token_factors[tokens],
            np.float32(1),
        )

    def adapt_texts(self, features: Floats) -> Floats:
        """Turn normalized features of texts (n, E) into vectors (n, E)."""
        return features if self.text_adapter is None else self.text_adapter(features)

    def adapt_images(self, features: Floats) -> Floats:
        """Turn normalized features of images (n, E) into vectors (n, E)."""
        return features if self.image_adapter is None else self.image_adapter(features)


def build_state(
    backbone: Any,
    config: ModelConfig,
    trainables: Mapping[str, Floats],
    hashes: tuple[str, str],
    text_inputs: Callable[[Floats | None], tuple[Floats, ...]],
    skipped: int,
) -> EncoderState:
    """Build the state of a model from its backbone and what a checkpoint holds.

    Args:
        backbone: a `Backbone` or `ClipFiles`. hashes: the fingerprint, and the
            backbone's.
        text_inputs: those of text prompts (depth, k, W_t). skipped: as in the state.

    Raise ModelError for a method with encoders of its own.
    """
    if any(name.startswith("encoders.") for name in trainables):
        raise ModelError(
            f"{config.method} can be compared by `dcar evaluate`, but not served; train"
            " another method"
        )
    prompt = config.prompt
    image_inputs = list[Floats]()
    image_key = hashlib.sha256(hashes[1].encode())
    if prompt.depths[1]:
        weight, bias, own = (
            trainables[f"prompts.{name}"]
            for name in ("couple.weight", "couple.bias", "residual")
        )
        image_inputs.append(trainables["prompts.text"] @ weight.T + bias + own)
    if config.adapter.blocks:
        image_inputs += [
            trainables["block_adapters.down"],
            trainables["block_adapters.up"],
        ]
    for name in sorted(trainables):
        if name.startswith("block_adapters.") or (
            name.startswith("prompts.") and prompt.depths[1]
        ):
            image_key.update(
                f"{name} {trainables[name].shape}".encode() + trainables[name].tobytes()
            )
    return EncoderState(
        fingerprint=hashes[0],
        image_key=image_key.hexdigest(),
        dim=backbone.embed_dim,
        scale=float(backbone.scale),
        patch_grid=backbone.patch_grid,
        reranks=config.rerank.blocks > 0 and config.rerank.weight > 0,
        preprocess=backbone.preprocess,
        tokenizer=backbone.text_tokenizer(prompt.length if prompt.text else 0),
        layout=backbone.layout,
        text_inputs=text_inputs(
            trainables["prompts.text"] if prompt.depths[0] else None
        ),
        skipped=skipped,
        image_inputs=tuple(
            np.ascontiguousarray(values[:, None]) for values in image_inputs
        ),
        token_factors=_token_factors(backbone, config.reweight, trainables),
        text_adapter=_feature_adapter("text_adapter", trainables),
        image_adapter=_feature_adapter("image_adapter", trainables),
    )


def _token_factors(
    backbone: Any,
    config: ReweightConfig,
    trainables: Mapping[str, Floats],
) -> Floats | None:
    """Tabulate `model.token_weights.TokenWeightHead` over the vocabulary: it reads a
    token's embedding alone.
    """
    if config.query != "predicted" or "head.linear.weight" not in trainables:
        return None
    parts = list[Floats]()
    for start in count(0, _CHUNK):
        rows = backbone.embeddings(start, start + _CHUNK)  # [n, W_t]
        if not len(rows):
            break
        centred = rows - rows.mean(1, keepdims=True)
        scaled = centred / np.sqrt(centred.var(1, keepdims=True) + 1e-5)
        factors = (
            1
            + scaled @ trainables["head.linear.weight"][0]
            + trainables["head.linear.bias"]
        )
        parts.append(factors.clip(config.low, config.high).astype(np.float32))
    return np.concatenate(parts)


def _feature_adapter(
    name: str, trainables: Mapping[str, Floats]
) -> FeatureAdapterArrays | None:
    names = [
        f"{name}.{part}"
        for part in ("down.weight", "down.bias", "up.weight", "up.bias")
    ]
    if names[0] in trainables:
        return FeatureAdapterArrays(*(trainables[part] for part in names))
    return None


def _grouped(
    inputs: Sequence[tuple[EncoderState, object]],
    key: Callable[[EncoderState], Hashable],
) -> Iterable[list[int]]:
    """Group inputs by a key of their states."""
    rows: dict[Hashable, list[int]] = {}
    for row, (state, _) in enumerate(inputs):
        rows.setdefault(key(state), []).append(row)
    return rows.values()


def _join(rows: Sequence[tuple[Floats, ...]]) -> tuple[Floats, ...]:
    """Join the inputs of each row of a batch along axis 1, unless all rows have the
    same.
    """
    is_shared = all(row is rows[0] for row in rows)
    if is_shared:
        return rows[0]
    return tuple(np.concatenate(parts, 1) for parts in zip(*rows, strict=True))


def group_by_length(lengths: Rows, batch_size: int) -> list[Rows]:
    """Return rows that go together, shortest first: a new group begins where padding
    costs more than another pass.
    """
    order = np.argsort(lengths, kind="stable")
    ascending = lengths[order].tolist()
    edges = [0]
    for row, length in enumerate(ascending):
        size = row - edges[-1]
        if size == batch_size or size * (length - ascending[row - 1]) > PASS_COST:
            edges.append(row)
    return [order[start:stop] for start, stop in pairwise(sorted({*edges, len(order)}))]


def normalize(vectors: Floats) -> Floats:
    """(n, E) at length 1; zeros stay zeros."""
    lengths = np.sqrt(np.einsum("ne,ne->n", vectors, vectors))
    unit: Floats = vectors / np.maximum(lengths, np.float32(1e-12))[:, None]
    return unit
