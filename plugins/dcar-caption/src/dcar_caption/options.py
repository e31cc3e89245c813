"""The options of `dcar data caption`. Nothing heavy is imported here."""

from dataclasses import dataclass
from pathlib import Path

from dcar_core.util.options import option


@dataclass(frozen=True, kw_only=True)
class CaptionOptions:
    """What a captioning run reads, asks and writes. Each field is an option of the
    command.
    """

    images: Path = option(help="Folder with one folder of images for each category.")
    out: Path = option(help="Annotations to write, such as photos/pairs.json.")
    url: str = option(
        help="OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1."
    )
    model: str = option(help="Vision model at the endpoint that writes the drafts.")
    judge_model: str | None = option(
        None, "Model that judges the drafts. Default: --model."
    )
    judge_url: str | None = option(None, "Endpoint of the judge. Default: --url.")
    judge: bool = option(True, "Judge the drafts.")
    dataset: str = option(
        "", "Subject of the images, for the questions. Default: the folder's name."
    )
    templates: Path | None = option(
        None, "File of questions, one a line, with {category}, {dataset} and {words}."
    )
    context: int = option(
        73,
        "Maximum CLIP tokens of a caption; the default leaves room for four prompts.",
        min=16,
    )
    rounds: int = option(3, "Maximum drafts per image.", min=1)
    concurrency: int = option(4, "Images captioned at a time.", min=1)
    side: int = option(768, "Longer side of the uploaded image, in pixels.", min=64)
    max_tokens: int = option(200, "Maximum tokens of a response.", min=16)
    temperature: float = option(0.2, "Sampling temperature.", min=0)
    timeout: float = option(120.0, "Seconds to wait for a response.", min=0.1)
    tries: int = option(6, "Attempts for one request.", min=1)
    restart: bool = option(False, "Discard earlier responses.")
