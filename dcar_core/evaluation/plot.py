"""recall.svg: R@1, R@5 and R@10 of each method. matplotlib is an optional dependency."""

from pathlib import Path

from dcar_core.evaluation.tables import Results


def plot_recall(results: Results, path: Path) -> str:
    """Draw mean, standard deviation and a dot for each seed; return Markdown with the plot, or with what is missing."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return "Without a plot: pip install 'dcar[plots]'"
    methods = results["methods"]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dcar", "axes.grid": True, "grid.alpha": 0.3}):
        figure = Figure(figsize=(11, 1 + 0.4 * len(methods)), layout="constrained")
        both = figure.subplots(1, 2, sharey=True)
        both[0].set_yticks(range(len(methods)), methods)
        both[0].set_ylim(len(methods) - 0.5, -0.5)
        for axes, direction, title in zip(both, ("t2i", "i2t"), ("Text-to-image", "Image-to-text"), strict=True):
            axes.set_title(f"{title} R@1, R@5, R@10")
            axes.set_xlabel("percent")
            for row, method in enumerate(methods.values()):
                for column in (f"{direction}_r{k}" for k in (1, 5, 10)):
                    mean, seeds = method["mean"][column], [run["test"][column] for run in method["runs"]]
                    axes.errorbar(mean, row, xerr=method["std"][column], fmt="o", color=f"C{row}", capsize=3)
                    axes.plot(seeds, [row + 0.25] * len(seeds), ".", color=f"C{row}", alpha=0.6)
        figure.savefig(path, metadata={"Date": None})
    return f"![Recall of each method]({path.name})"
