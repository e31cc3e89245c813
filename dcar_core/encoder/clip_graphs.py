"""Both towers of CLIP's own family as OpenVINO graphs, straight on the weights of a
file.

- Inputs and outputs are those of `graphs`, whose towers run on PyTorch; a test compares
  the vectors of both.
- Weights are constants in the memory that is mapped from their file.
- The last block runs for the row that is pooled alone: the class row of an image, the
  end token of a text.
- In float32 the activation is written out. OpenVINO would fuse it into the product
  before it, whose weights it then packs once for small batches and again for large
  ones; alone it is faster there, and slower in bfloat16.

Letters as in `encoder.graphs`.
"""

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from dcar_core.encoder.runtimes import EXPORTED, open_openvino
from dcar_core.encoder.state import (
    OPENVINO_OPTIONS,
    EncoderState,
    Runtime,
    build_state,
    openvino_library,
)
from dcar_core.model.checkpoint import Trainables
from dcar_core.model.clip_files import ClipFiles
from dcar_core.model.config import ModelConfig
from dcar_core.util.arrays import Floats

Node = Any  # of OpenVINO
_ZERO = np.int64(0)
_ONE = np.int64(1)


class _Tower:
    """The parts of a tower as nodes of a graph. prefix: of the names of its weights.
    fuses: its activation.
    """

    def __init__(self, clip: ClipFiles, prefix: str, *, fuses: bool) -> None:
        self.ops = openvino_library().opset13
        self.clip = clip
        self.prefix = prefix
        self.fuses = fuses
        sizes = clip.vision if prefix else clip.text
        self.width = int(sizes["width"])
        self.blocks = int(sizes["layers"])
        self.heads = int(
            self.width // sizes["head_width"] if prefix else sizes["heads"]
        )

    def weight(self, name: str) -> Node:
        return self.constant(self.clip.weights[self.prefix + name])

    def constant(self, values: ArrayLike) -> Node:
        return self.ops.constant(np.asarray(values, np.float32), shared_memory=True)

    def input(self, *shape: int, kind: Any = np.float32) -> Node:
        return self.ops.parameter(list(shape), kind)

    def at(self, values: Node, i: int) -> Node:
        """(D, ...) -> (...)"""
        return self.ops.gather(values, np.int64(i), _ZERO)

    def rows(self, x: Node, start: Any, stop: Any, axis: int) -> Node:
        bounds = (
            np.array([value]) if isinstance(value, int) else value
            for value in (start, stop, 1, axis)
        )
        return self.ops.slice(x, *bounds)

    def reshaped(self, x: Node, *shape: int) -> Node:
        """0 keeps a length."""
        return self.ops.reshape(x, np.array(shape), special_zero=True)

    def transposed(self, x: Node, *order: int) -> Node:
        return self.ops.transpose(x, np.array(order))

    def for_batch(self, x: Node, batch: Node) -> Node:
        """(R, ...) -> (B, ...)"""
        size = self.rows(self.ops.shape_of(batch), 0, 1, 0)
        shape = self.ops.concat(
            [size, np.ones(len(x.get_output_partial_shape(0)) - 1, np.int64)], 0
        )
        return self.ops.broadcast(x, shape, broadcast_spec="BIDIRECTIONAL")

    def normalized(self, x: Node) -> Node:
        return self.ops.mvn(x, np.array([-1]), True, 1e-5, "INSIDE_SQRT")

    def norm(self, x: Node, name: str) -> Node:
        return self.normalized(x) * self.weight(f"{name}.weight") + self.weight(
            f"{name}.bias"
        )

    def linear(self, x: Node, name: str) -> Node:
        return self.ops.matmul(
            x,
            self.weight(f"{name}weight"),
            False,
            True,
        ) + self.weight(f"{name}bias")

    def queries_keys_values(self, x: Node, i: int) -> list[Node]:
        """(B, n, W) -> three of (B, H, n, d), before block i."""
        name = f"transformer.resblocks.{i}."
        parts = self.ops.split(
            self.linear(self.norm(x, f"{name}ln_1"), f"{name}attn.in_proj_"),
            np.int64(-1),
            3,
        )
        return [
            self.transposed(self.reshaped(part, 0, 0, self.heads, -1), 0, 2, 1, 3)
            for part in parts.outputs()
        ]

    def block(
        self,
        x: Node,
        i: int,
        q: Node,
        k: Node,
        v: Node,
        mask: Node | None = None,
    ) -> Node:
        """Attention of the rows x (B, m, W) by their q, and the MLP -> (B, m, W)."""
        name = f"transformer.resblocks.{i}."
        read = self.ops.scaled_dot_product_attention(q, k, v, mask)  # [B, H, m, d]
        x = x + self.linear(
            self.reshaped(self.transposed(read, 0, 2, 1, 3), 0, 0, -1),
            f"{name}attn.out_proj.",
        )
        inner = self.activated(
            self.linear(self.norm(x, f"{name}ln_2"), f"{name}mlp.c_fc.")
        )
        return x + self.linear(inner, f"{name}mlp.c_proj.")

    def activated(self, x: Node) -> Node:
        if self.fuses:
            if self.clip.quick_gelu:
                return self.ops.swish(x, np.float32(1.702))
            return self.ops.gelu(x, "erf")
        half = x * self.constant([[[0.5]]])
        quick = self.clip.quick_gelu
        scaled = x * self.constant([[[1.702 / 2 if quick else 2**-0.5]]])
        return half + half * (self.ops.tanh(scaled) if quick else self.ops.erf(scaled))


def image_graph(clip: ClipFiles, depth: int, *, has_adapters: bool, fuses: bool) -> Any:
    """(pixels, prompts, down, up) -> image features (B, E), not normalized: see
    `graphs.ImageGraph`.
    """
    tower = _Tower(clip, "visual.", fuses=fuses)
    ops = tower.ops
    width = tower.width
    patch = clip.vision["patch_size"]
    size = clip.preprocess.size
    pixels = tower.input(-1, 3, size, size, kind=np.uint8)
    patches = clip.patch_grid**2
    prompts = [tower.input(depth, -1, -1, width)] * (depth > 0)
    adapters = [
        tower.input(tower.blocks, -1, -1, width) for _ in range(2 * has_adapters)
    ]
    mean, std = (
        np.array(v, np.float32).reshape(1, 3, 1, 1)
        for v in (clip.preprocess.mean, clip.preprocess.std)
    )
    x = ops.convert(pixels, "f32") * (1 / (255 * std)) + (-mean / std)
    x = ops.convolution(
        x,
        tower.weight("conv1.weight"),
        [patch, patch],
        [0, 0],
        [0, 0],
        [1, 1],
    )
    x = tower.transposed(tower.reshaped(x, 0, width, -1), 0, 2, 1)  # [B, P, W]
    class_row = tower.for_batch(
        tower.reshaped(tower.weight("class_embedding"), 1, 1, width), x
    )
    x = ops.concat([class_row, x], 1) + tower.weight("positional_embedding")
    if depth:
        x = ops.concat([x, tower.for_batch(tower.at(prompts[0], 0), x)], 1)
    x = tower.norm(x, "ln_pre")
    for i in range(tower.blocks):
        if 0 < i < depth:
            x = ops.concat(
                [
                    tower.rows(x, 0, 1 + patches, 1),
                    tower.for_batch(tower.at(prompts[0], i), x),
                ],
                1,
            )
        q, k, v = tower.queries_keys_values(x, i)
        if i == tower.blocks - 1:
            x = tower.rows(x, 0, 1, 1)
            q = tower.rows(q, 0, 1, 2)
        x = tower.block(x, i, q, k, v)
        if has_adapters:
            down, up = (tower.at(values, i) for values in adapters)  # [R, r, W]
            inner = ops.relu(ops.matmul(tower.normalized(x), down, False, True))
            x = x + ops.matmul(inner, up, False, False)
    x = ops.matmul(
        tower.norm(tower.reshaped(x, 0, width), "ln_post"),
        tower.weight("proj"),
        False,
        False,
    )
    return openvino_library().Model([x], [pixels, *prompts, *adapters])


def text_graph(clip: ClipFiles, *, fuses: bool) -> Any:
    """(tokens, weights, keys, values) -> text features (B, E), not normalized: see
    `graphs.PrefixTextGraph`.
    """
    tower = _Tower(clip, "", fuses=fuses)
    ops = tower.ops
    blocks = tower.blocks
    heads = tower.heads
    width = tower.width
    tokens = tower.input(-1, -1, kind=np.int64)
    weights = tower.input(-1, -1)
    keys, values = (
        tower.input(blocks, -1, heads, -1, width // heads) for _ in range(2)
    )
    p = tower.rows(ops.shape_of(keys), 3, 4, 0)
    stop = p + tower.rows(ops.shape_of(tokens), 1, 2, 0)  # p + n
    ends = ops.convert(ops.equal(tokens, np.int64(clip.layout.end_id)), "i64")
    is_before = ops.convert(ops.equal(ops.cum_sum(ends, _ONE), _ZERO), "i64")
    last = ops.reduce_sum(is_before, _ONE, True)  # [B, 1], the first end token
    x = ops.gather(
        tower.weight("token_embedding.weight"),
        tokens,
        _ZERO,
    ) * ops.unsqueeze(weights, np.int64(-1))
    x = x + tower.rows(tower.weight("positional_embedding"), p, stop, 0)  # [B, n, W_t]
    mask = tower.rows(
        tower.rows(
            tower.constant(_causal_mask(clip.layout.context_length)),
            p,
            stop,
            0,
        ),
        0,
        stop,
        1,
    )
    for i in range(blocks):
        q, k, v = tower.queries_keys_values(x, i)
        # [B, H, p + n, d]
        k = ops.concat([tower.for_batch(tower.at(keys, i), x), k], 2)
        v = ops.concat([tower.for_batch(tower.at(values, i), x), v], 2)
        if i == blocks - 1:
            x = ops.gather(x, last, _ONE, 1)
            q = ops.gather(q, last, np.int64(2), 1)
            # [B, 1, 1, p + n]
            mask = ops.unsqueeze(ops.gather(mask, last, _ZERO), _ONE)
        x = tower.block(x, i, q, k, v, mask)
    x = ops.matmul(
        tower.norm(tower.reshaped(x, 0, width), "ln_final"),
        tower.weight("text_projection"),
        False,
        False,
    )
    return openvino_library().Model([x], [tokens, weights, keys, values])


def prefix(clip: ClipFiles, prompts: Floats | None) -> tuple[Floats, Floats]:
    """Prompts (depth, k, W_t) -> keys and values of start tokens and prompts: see
    `graphs.PrefixTextGraph`.
    """
    tower = _Tower(clip, "", fuses=True)
    outputs = list[Node]()
    start = clip.weights["token_embedding.weight"][list(clip.layout.start_ids)].astype(
        np.float32
    )[None]
    given = start if prompts is None else np.concatenate([start, prompts[:1]], 1)
    rows = tower.input(*given.shape)
    mask = tower.constant(_causal_mask(given.shape[1]))
    x = rows + tower.constant(clip.weights["positional_embedding"][: given.shape[1]])
    for i in range(tower.blocks):
        if prompts is not None and 0 < i < len(prompts):
            x = tower.ops.concat(
                [
                    tower.rows(x, 0, start.shape[1], 1),
                    tower.constant(prompts[i : i + 1]),
                ],
                1,
            )
        q, k, v = tower.queries_keys_values(x, i)
        outputs += [k, v]
        x = tower.block(x, i, q, k, v, mask)
    graph = (
        openvino_library()
        .Core()
        .compile_model(
            openvino_library().Model(outputs, [rows]),
            "CPU",
            OPENVINO_OPTIONS,
        )
    )
    arrays = list(graph([given]).values())
    return np.stack(arrays[::2]), np.stack(arrays[1::2])


def _causal_mask(length: int) -> Floats:
    return np.triu(np.full((length, length), -np.inf, np.float32), 1)


def load_state(
    clip: ClipFiles,
    config: ModelConfig,
    trainables: Trainables,
    hashes: tuple[str, str],
) -> EncoderState:
    """Build the state of a model of the family; see `state.build_state`."""
    return build_state(
        clip,
        config,
        trainables,
        hashes,
        partial(prefix, clip),
        len(clip.layout.start_ids),
    )


def open_clip_graphs(
    name: str,
    clip: ClipFiles,
    config: ModelConfig,
    backbone_hash: str,
    threads: int | None,
) -> Runtime:
    """Open a runtime of `runtimes.EXPORTED` on the weights of a file, or return the one
    that is open.
    """
    depth = config.prompt.depths[1]
    has_adapters = config.adapter.blocks > 0
    fuses = EXPORTED[name] == "bf16"

    def graphs() -> tuple[Any, Any]:
        return text_graph(clip, fuses=fuses), image_graph(
            clip,
            depth,
            has_adapters=has_adapters,
            fuses=fuses,
        )

    return open_openvino(
        name,
        (backbone_hash, depth, has_adapters),
        clip.files[1].parent,
        threads,
        graphs,
    )
