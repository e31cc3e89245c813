"""The results as Markdown and CSV: the paper's table first, then what it does not show. All figures in percent."""

import csv
import io
from typing import Any

COLUMNS = ("t2i_r1", "t2i_r5", "t2i_r10", "i2t_r1", "i2t_r5", "i2t_r10")
HEADINGS = ("text-to-image R@1", "R@5", "R@10", "image-to-text R@1", "R@5", "R@10")
Results = dict[str, Any]


def table(results: Results) -> str:
    """The paper's table: mean ± standard deviation over the seeds."""
    return _markdown(recall_rows(results))


def recall_rows(results: Results) -> list[list[str]]:
    """The same as rows of cells, the headings first; as many columns as `means` has, and one for the name."""
    rows = [["method", *HEADINGS, "above its hard negatives"]]
    for name, found in results["methods"].items():
        stds = [*(found["std"][c] for c in COLUMNS), (found["hard_negative_accuracy"] or {"std": None})["std"]]
        several = len(found["runs"]) > 1
        rows.append([name, *(_spread(mean, std, several) for mean, std in zip(means(found), stds, strict=True))])
    return rows + [[name, *["diverged"] * len(COLUMNS), "-"] for name in results["diverged"]]


def means(found: dict[str, Any]) -> list[float | None]:
    """Of a method, by column of the table; None for hard negatives where the data have none."""
    return [*(found["mean"][c] for c in COLUMNS), (found["hard_negative_accuracy"] or {"mean": None})["mean"]]


def _spread(mean: float | None, std: float | None, several: bool) -> str:
    if mean is None:
        return "-"
    return f"{mean:.1f} ± {std:.1f}" if several else f"{mean:.1f}"


def markdown(results: Results) -> str:
    """results.md: the table, how it came about, the weakest categories and the most frequent confusions."""
    seeds = max(len(found["runs"]) for found in results["methods"].values())
    pairs, settings = results["pairs"], results["training"]
    parts = [
        f"# {results['data']}",
        f"Backbone {results['backbone']}; {pairs['train']:,} pairs to train, {pairs['val']:,} to choose on, "
        f"{pairs['test']:,} to test. {settings['epochs']} epochs of batches of {settings['batch_size']}; "
        f"{seeds} seed{'s' if seeds > 1 else ''}, mean ± standard deviation, percent.",
        table(results),
        *(f"{name} is left out: {reason}" for name, reason in results["diverged"].items()),
        "## Settings",
        settings_table(results),
    ]
    best = best_method(results)
    categories = mean_categories(results, best)
    if categories:
        telling = {n: c for n, c in categories.items() if c["pairs"] >= 3} or categories  # of one pair, R@1 says little
        weakest = sorted(telling.items(), key=lambda item: (item[1]["t2i_r1"] + item[1]["i2t_r1"], item[0]))[:10]
        rows = [["category", "pairs", "text-to-image R@1", "image-to-text R@1"]]
        rows += [[n, str(c["pairs"]), f"{c['t2i_r1']:.1f}", f"{c['i2t_r1']:.1f}"] for n, c in weakest]
        parts += [f"## Weakest categories of {best}", _markdown(rows)]
    confusions = results["methods"][best]["runs"][0]["confusions"]
    if confusions:
        rows = [["asked for", "found first", "captions"]]
        rows += [[c["category"], c["taken_for"], f"{c['count']} of {c['of']}"] for c in confusions]
        parts += [f"## Most confused categories of {best}", _markdown(rows)]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def settings_table(results: Results) -> str:
    """Trainable parameters, learning rate, and what validation said of the others and of the queries' weights."""
    return _markdown(settings_rows(results))


def settings_rows(results: Results) -> list[list[str]]:
    """The same as rows of cells, the headings first."""
    grid = [f"{lr:g}" for lr in results["grid"] or ()]
    rows = [["method", "trainable", "query weights", "seconds a run", "learning rate"]]
    rows[0] += [f"validation R@1 at {lr}" for lr in grid]
    for name, found in results["methods"].items():
        rate = f"{found['lr']:g}" if found["lr"] is not None else "-"
        seconds = sum(run["seconds"] for run in found["runs"]) / len(found["runs"])
        reached = found["tuning"] or {}
        cells = ["-" if not reached else _reached(reached.get(lr)) for lr in grid]
        rows.append([name, f"{found['trainable']:,}", query_weights(found), f"{seconds:.0f}", rate, *cells])
    return rows


def query_weights(found: dict[str, Any]) -> str:
    """What validation chose for the queries of a method's runs: token weights predicted from the text, or none."""
    runs = found["runs"]
    predicted = sum(run["query"] == "predicted" for run in runs)
    return f"predicted in {predicted} of {len(runs)}" if 0 < predicted < len(runs) else str(runs[0]["query"])


def _reached(score: float | None) -> str:
    return "diverged" if score is None else f"{score:.1f}"


def best_method(results: Results) -> str:
    """By validation, as a user would choose."""
    methods = results["methods"]

    def validation(name: str) -> float:
        runs = methods[name]["runs"]
        return float(sum(run["val"]["t2i_r1"] + run["val"]["i2t_r1"] for run in runs) / len(runs))

    names: list[str] = list(methods)
    return max(names, key=validation)


def mean_categories(results: Results, name: str) -> dict[str, dict[str, float]]:
    """Per category: pairs, and R@1 both ways as the mean over a method's seeds."""
    runs = [run["categories"] for run in results["methods"][name]["runs"]]
    return {
        category: {key: sum(run[category][key] for run in runs) / len(runs) for key in ("t2i_r1", "i2t_r1")}
        | {"pairs": first["pairs"]}
        for category, first in runs[0].items()
    }


def csv_runs(results: Results) -> str:
    """results.csv: a line for every run."""
    text = io.StringIO(newline="")
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(
        ["method", "seed", "lr", "trainable", "query_weights", "epoch", "seconds", *COLUMNS, "hard_negative_accuracy"]
    )
    for name, found in results["methods"].items():
        for run in found["runs"]:
            hard = run["hard_negative_accuracy"]
            lr = "" if found["lr"] is None else run["lr"]
            lines.writerow(
                [name, run["seed"], lr, run["trainable"], run["query"], run["epoch"], run["seconds"]]
                + [f"{run['test'][c]:.3f}" for c in COLUMNS]
                + ["" if hard is None else f"{hard:.3f}"]
            )
    return text.getvalue()


def _markdown(rows: list[list[str]]) -> str:
    head, *body = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
