"""Results of `dcar evaluate` next to the paper's table (ViT-B/32, R@1), column by column.

    python benchmarks/paper_table.py results/*/results.json

- A data set is identified by the name of its directory.
- The average is printed once all nine data sets have results. Without arguments, our columns are empty.
"""

import argparse
import json
from pathlib import Path

METHODS = ("clip", "clip-adapter", "coop", "maple", "dcar")
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


def table(results: dict[str, dict]) -> str:
    """Return Markdown: one row for each data set, "ours / paper" for each method."""
    parts = []
    for direction, (label, column) in enumerate(DIRECTIONS):
        rows = [[f"{label} R@1, ours / paper", *METHODS], ["---"] * (1 + len(METHODS))]
        ours = {
            name: {method: result["mean"][column] for method, result in content["methods"].items()}
            for name, content in results.items()
        }
        for name, paper in PAPER.items():
            recalls = ours.get(name, {})
            rows.append([name, *(cell(recalls.get(m), paper[direction][i]) for i, m in enumerate(METHODS))])
        measured = {m: [recalls[m] for recalls in ours.values() if m in recalls] for m in METHODS}
        means = [sum(measured[m]) / len(PAPER) if len(measured[m]) == len(PAPER) else None for m in METHODS]
        rows.append(["average of nine", *(cell(mean, AVERAGE[direction][i]) for i, mean in enumerate(means))])
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
    return "\n\n".join(parts)


def cell(ours: float | None, paper: float) -> str:
    """Return "ours / paper"; ours is empty if it was not measured."""
    return f"{'' if ours is None else f'{ours:.2f}'} / {paper:.2f}"


def main() -> None:
    """Print the tables for the given results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, help="results.json files, one for each data set")
    contents = [json.loads(path.read_text()) for path in parser.parse_args().results]
    unknown = sorted({content["data"] for content in contents} - set(PAPER))
    if unknown:
        parser.error(f"{', '.join(unknown)} is not in the paper's table; it has {', '.join(PAPER)}")
    print(table({content["data"]: content for content in contents}))


if __name__ == "__main__":
    main()
