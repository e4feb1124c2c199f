"""Draw the long tables of a notebook in this folder: `python docs/measured/draw.py`.

The figures come from the Markdown alone. matplotlib is there because MLflow needs it; Sentei itself does not.
"""

from __future__ import annotations

from pathlib import Path

from matplotlib import pyplot

FOLDER = Path(__file__).resolve().parent
NOTEBOOK = FOLDER / "2026-11-26.md"
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "sentei", "font.size": 9, "legend.fontsize": 8}
Row = dict[str, str]


def read_tables(path: Path, first_column: str) -> list[list[Row]]:
    """Return all tables of the page whose header begins with that column and one more."""
    tables: list[list[Row]] = []
    for block in path.read_text(encoding="utf-8").split("\n\n"):
        lines = [line.strip("|").split("|") for line in block.splitlines() if line.startswith("|")]
        cells = [[cell.strip() for cell in line] for line in lines]
        if cells and " ".join(cells[0]).startswith(first_column):
            tables.append([dict(zip(cells[0], row, strict=True)) for row in cells[2:]])
    return tables


def percent(text: str) -> float:
    """Return "8.9%" as 8.9."""
    return float(text.removesuffix("%"))


def draw_choices(tables: list[list[Row]], path: Path) -> None:
    """Draw how much worse than ours each other choice of blocks is, by density, with its interval."""
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for axis, table, title in zip(axes, tables, ("source", "prose"), strict=True):
        densities = list(dict.fromkeys(row["density"] for row in table))
        others = [name for name in dict.fromkeys(row["choice"] for row in table) if name.endswith("ours")]
        for i_other, name in enumerate(others):
            rows = [row for row in table if row["choice"] == name]
            middle = [float(row["NLL difference"]) for row in rows]
            low = [m - float(row["low"]) for m, row in zip(middle, rows, strict=True)]
            high = [float(row["high"]) - m for m, row in zip(middle, rows, strict=True)]
            places = [i + 0.1 * (i_other - 2.5) for i in range(len(rows))]
            label = name.removesuffix(", against ours")
            axis.errorbar(places, middle, (low, high), fmt="o", ms=4, lw=1.2, label=label)
        axis.axhline(0, color="black", lw=0.8)
        axis.set_xticks(range(len(densities)), densities)
        axis.set_title(title)
        axis.set_xlabel("density")
    axes[0].set_ylabel("NLL above ours, nats per token")
    axes[0].legend()
    save(figure, path)


def draw_kernels(table: list[Row], path: Path) -> None:
    """Draw the speed-up with the scorer by density: against PyTorch's best, and against our own dense."""
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    lines: dict[tuple[str, str, str], list[Row]] = {}
    for row in table:
        lines.setdefault((row["type"], row["tokens"], row["head"]), []).append(row)
    colors = {"8,192": "tab:blue", "16,384": "tab:orange", "32,768": "tab:green"}
    for (dtype, tokens, head), rows in lines.items():
        densities = [percent(row["density"]) for row in rows]
        own = [float(row["native dense, ms"]) / float(row["with scorer, ms"]) for row in rows]
        style = {
            "color": colors[tokens] if dtype == "bf16" else "tab:gray",
            "ls": "-" if head == "64" else "--",
        }
        label = f"{dtype}, {tokens}, head {head}"
        axes[0].plot(densities, [float(row["with scorer, times"]) for row in rows], "o", ms=3, **style)
        axes[1].plot(densities, own, "o", ms=3, label=label, **style)
    for axis, title in zip(
        axes, ("against the faster of SDPA and Flex", "against our own dense"), strict=True
    ):
        axis.plot([50, 20, 10, 5], [2, 5, 10, 20], color="black", lw=0.8, ls=":", label="1 / density")
        axis.set(xscale="log", yscale="log", title=title, xlabel="blocks kept, %")
        axis.set_xticks([50, 20, 10, 5], ["50", "20", "10", "5"], minor=False)
        axis.set_xticks([], minor=True)
        axis.set_yticks([2, 5, 10, 20, 30], ["2", "5", "10", "20", "30"])
        axis.set_yticks([], minor=True)
        axis.invert_xaxis()
    axes[0].set_ylabel("times as fast, scorer included")
    axes[1].legend(fontsize=7)
    save(figure, path)


def save(figure: pyplot.Figure, path: Path) -> None:
    """Write the picture, the same bytes for the same numbers."""
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    pyplot.switch_backend("svg")
    pyplot.rcParams.update(STYLE)
    draw_choices(read_tables(NOTEBOOK, "density choice"), FOLDER / "choices.svg")
    draw_kernels(read_tables(NOTEBOOK, "tokens type head density")[0], FOLDER / "kernels.svg")
