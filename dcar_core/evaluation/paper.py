"""The paper's data sets and result table, and our results next to it (ViT-B/32, R@1)."""

from collections.abc import Mapping
from pathlib import Path

from dcar_core.data import Annotations
from dcar_core.evaluation.tables import Results, markdown
from dcar_core.util.errors import DataError

METHODS = ("clip", "clip-adapter", "coop", "maple", "dcar")  # those of the paper that are implemented
OURS = ("dcar+", "query-prompts", "query-prompts with rerank")
# R@1 of METHODS, image-to-text and text-to-image, from the results table of arXiv 2508.04028
PAPER = {
    "caltech101": ((38.99, 39.41, 45.13, 46.26, 48.13), (32.17, 30.22, 29.70, 29.69, 36.78)),
    "pets": ((40.77, 43.43, 49.88, 49.40, 52.88), (30.69, 29.19, 31.59, 30.50, 39.82)),
    "cars": ((25.88, 32.41, 34.33, 43.50, 45.52), (18.60, 18.65, 21.63, 26.78, 32.90)),
    "flowers": ((16.08, 18.00, 24.33, 24.38, 26.04), (12.87, 10.32, 12.11, 12.38, 18.56)),
    "food101": ((13.83, 13.99, 18.77, 19.50, 21.80), (6.98, 6.20, 8.50, 8.00, 13.03)),
    "aircraft": ((19.41, 21.98, 23.80, 26.12, 28.94), (18.93, 12.48, 12.84, 14.12, 20.47)),
    "sun397": ((34.94, 37.09, 43.05, 45.60, 47.34), (23.48, 19.97, 19.03, 18.62, 34.30)),
    "dtd": ((37.94, 40.19, 45.93, 44.39, 47.10), (29.49, 18.55, 18.32, 20.39, 30.73)),
    "ucf101": ((15.49, 16.26, 18.53, 19.60, 21.12), (12.34, 10.49, 10.65, 11.62, 18.62)),
}
AVERAGE = ((27.04, 29.20, 33.75, 35.42, 37.65), (20.62, 17.34, 18.26, 19.12, 27.25))
DIRECTIONS = (("image-to-text", "i2t_r1"), ("text-to-image", "t2i_r1"))


def find_data_sets(root: Path) -> tuple[dict[str, Path], list[str]]:
    """Return the paper's data sets below `root` that have pairs for training and test, and a line for each other one.

    Raises:
        DataError: no data set can be used.
    """
    usable, missing = dict[str, Path](), list[str]()
    for name in PAPER:
        try:
            lacking = {"train", "test"}.difference(Annotations(root / name).splits())
        except DataError as error:
            missing.append(f"{name} is left out: {error}")
        else:
            if lacking:
                missing.append(f"{name} is left out: it has no {' and '.join(sorted(lacking))} pairs")
            else:
                usable[name] = root / name
    if not usable:
        found = [f"; {line}" for name, line in zip(PAPER, missing, strict=True) if (root / name).is_dir()]
        needed = f"folders such as {root / 'dtd'} with train.json and test.json{''.join(found)}"
        raise DataError(f"{root} has none of the paper's data sets that can be used, {needed}")
    return usable, missing


def paper_tables(results: Mapping[str, Results]) -> str:
    """Return Markdown: for each direction a row per data set with results, "ours / paper" for each method.

    results: by data set. The average is given once all nine data sets have results.
    """
    parts = []
    for direction, (label, column) in enumerate(DIRECTIONS):
        ours = {
            name: {method: found["mean"][column] for method, found in results[name]["methods"].items()}
            for name in PAPER
            if name in results
        }
        rows = [[f"{label} R@1, ours / paper", *METHODS, *OURS]]
        for name, recalls in ours.items():
            rows.append([name, *_cells(recalls, PAPER[name][direction])])
        if len(ours) == len(PAPER):
            complete = [m for m in METHODS + OURS if all(m in recalls for recalls in ours.values())]
            means = {m: sum(recalls[m] for recalls in ours.values()) / len(ours) for m in complete}
            rows.append(["average of nine", *_cells(means, AVERAGE[direction])])
        parts.append(markdown(rows))
    return "\n".join(parts)


def _cells(ours: Mapping[str, float], paper: tuple[float, ...]) -> list[str]:
    """Return "ours / paper" for the paper's methods, "ours" for the others; "-" if it was not measured."""
    texts = [f"{ours[method]:.2f}" if method in ours else "-" for method in METHODS + OURS]
    return [*(f"{text} / {figure:.2f}" for text, figure in zip(texts, paper, strict=False)), *texts[len(paper) :]]
