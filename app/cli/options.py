"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "emoji"

Data = Annotated[
    Path,
    typer.Option(
        help="Directory with train.json, val.json, test.json, or a table; see docs/reference/data-formats.md."
    ),
]
ModelName = Annotated[
    str, typer.Option("--model", help="An open_clip model such as ViT-B-32-quickgelu, or a model directory.")
]
Pretrained = Annotated[
    str | None,
    typer.Option(help="Weights for a model name: a tag (openai) or a .safetensors / .pt file. Not for a directory."),
]
Images = Annotated[Path | None, typer.Option(help="Where the pictures are, when not beside the annotations.")]
SkipBroken = Annotated[bool, typer.Option("--skip-broken", help="Leave out pictures that are missing or broken.")]
Negatives = Annotated[
    str,
    typer.Option(
        help="Make negative captions: auto (where most pairs of a split have none), missing (for every pair without), "
        "all (also in place of the data's own), off."
    ),
]
Taxonomy = Annotated[
    Path | None,
    typer.Option(
        help="JSON that groups similar categories, for generated negatives; see docs/reference/data-formats.md."
    ),
]
Workers = Annotated[int | None, typer.Option(min=0, help="Processes that decode pictures; default: by size.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]
Runtime = Annotated[
    str,
    typer.Option(
        envvar="DCAR_RUNTIME",
        help="What runs the encoder: auto (the fastest that is right here, measured once), torch, openvino-bf16, ..",
    ),
]
Epochs = Annotated[int, typer.Option(min=1)]
BatchSize = Annotated[int, typer.Option(min=2)]
Patience = Annotated[
    int, typer.Option(min=0, help="Stop after so many epochs without a better validation recall; 0 never stops.")
]
Accumulate = Annotated[
    int, typer.Option(min=1, help="Compute a batch in so many parts, for a small device; the result is the same.")
]
Amp = Annotated[str, typer.Option(help="Mixed precision: auto (where a GPU has it), off, bfloat16 or float16.")]
Features = Annotated[
    Path | None,
    typer.Option(
        envvar="DCAR_FEATURES", help="Where frozen features are kept, for other runs too. Default: OUT/features."
    ),
]
LearningRate = Annotated[float, typer.Option("--lr", min=0)]
IndexDir = Annotated[Path, typer.Option("--index", help="Directory of a published index.")]
Checkpoint = Annotated[Path, typer.Option(help="What `dcar train` or `dcar zero-shot` wrote.")]
Gallery = Annotated[
    str,
    typer.Option(
        help="Folder of pictures and tars, or a list: .jsonl, .csv, .parquet. A path, or a URL: s3://, https://, .."
    ),
]
Out = Annotated[Path, typer.Option(help="Directory to write to.")]
