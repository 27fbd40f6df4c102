"""How the summary is shown: tables on a page of Markdown, and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.quality.moments import PERCENTILES
from benchmarks.quality.runs import OURS_8BIT, OURS_32BIT, REFERENCE, SOURCES
from benchmarks.reporting import format_table


def _plus_minus(mean: float | None, deviation: float | None, form: str = ".4f") -> str:
    if mean is None:
        return ""
    return format(mean, form) + ("" if deviation is None else f" ± {deviation:.4f}")


def _loss(numbers: dict[str, Any] | None) -> str:
    if numbers is None:
        return ""
    if "errors" in numbers:
        return "fails"
    text = _plus_minus(numbers["mean"], numbers["std"])
    if numbers["diverged"]:
        text = f"{text} ({numbers['diverged']} of {numbers['runs']} diverged)".strip()
    return text


def _difference(numbers: dict[str, Any] | None) -> str:
    if numbers is None:
        return ""
    return _plus_minus(numbers["difference"], numbers["difference_std"], "+.4f")


def family_table(rows: list[dict[str, Any]]) -> str:
    """The family, a line for each task and rule; below it, why runs failed."""
    headers = ["task", "rule", "lr", *SOURCES, "8-bit - 32-bit", "within spread", "seeds"]
    lines, notes = [], []
    for row in rows:
        of = row["sources"]
        verdict = {None: "", True: "yes", False: "no"}[row["within_spread"]]
        seeds = str(max(numbers["runs"] for numbers in of.values()))
        losses = [_loss(of.get(source)) for source in SOURCES]
        difference = _difference(of.get(OURS_8BIT))
        lines.append(
            [row["task"], row["rule"], f"{row['lr']:g}", *losses, difference, verdict, seeds]
        )
        for source, numbers in of.items():
            for error in numbers.get("errors", ()):
                notes.append(f"{source} fails on {row['task']}, {row['rule']}: {error}")
    return "\n\n".join([format_table(headers, lines, left=2), *dict.fromkeys(notes)])


def ablation_table(rows: list[dict[str, Any]]) -> str:
    """The ablation: the share of diverged runs, and what the others lose to 32-bit state."""
    lrs = sorted({lr for row in rows for lr in row["by_lr"]}, key=float)
    headers = ["state", "embeddings", "diverged", *(f"loss over 32-bit, lr {lr}" for lr in lrs)]
    lines = []
    for row in rows:
        bits = row["embeddings"] if row["codec"] != REFERENCE else ""
        diverged = f"{row['share_diverged']:.0%} of {row['runs']}"
        cells = [row["by_lr"].get(lr) for lr in lrs]
        texts = [_loss(c) if row["codec"] == REFERENCE else _difference(c) for c in cells]
        lines.append([row["codec"], bits, diverged, *texts])
    return format_table(headers, lines, left=2)


def rounding_table(rows: list[dict[str, Any]]) -> str:
    """Ways of rounding: loss, and the error of the update at a few steps."""
    steps = sorted({step for row in rows for step in row["update_error"]})
    shown = sorted({steps[round(q * (len(steps) - 1))] for q in (0, 0.25, 0.5, 1)}) if steps else []
    names = "/".join(f"{100 * q:.0f}" for q in PERCENTILES)
    headers = ["", "second moments", "held-out loss", "over 32-bit"]
    headers += [*(f"error at {step}" for step in shown), f"stored/exact v, percentile {names}"]
    lines = []
    for row in rows:
        way = row["rounding"]
        difference = "" if way == OURS_32BIT else _difference(row)
        errors = [_plus_minus(*row["update_error"].get(step, (None, None))) for step in shown]
        ratios = " / ".join(f"{ratio:.2f}" for ratio in row["stored_over_exact"])
        lines.append([row["row"], way, _loss(row), difference, *errors, ratios])
    return format_table(headers, lines, left=2)


FAMILY_TEXT = """Held-out loss at the end, in nats: mean ± standard deviation over seeds. A seed
gives the same parameters and the same batches to all. "8-bit - 32-bit" is the mean and deviation of
the differences of the same seed; "within spread" says whether that mean is no more than the
deviation of the 32-bit runs."""
ABLATION_TEXT = """AdamW on the GPT, beta2 0.999. Rows "emulated" are `torch.optim.AdamW` whose
moments are quantized and dequantized after every step, to nearest, in plain PyTorch: a second
moment may become zero, and blocks are of the flattened tensor. A run has diverged if its loss was
not finite or ended above that of a guess; differences are of the other runs, for the same seed."""
ROUNDING_TEXT = """AdamW8bit on the GPT. The error is that of the update, relative, in the L2 norm,
against float32 moments that are fed the same gradients: mean ± standard deviation over seeds."""


def page(summary: dict[str, Any]) -> str:
    """The result as Markdown."""
    machines = "; ".join(
        ", ".join([m["cpu"], *(f"{k} {v}" for k, v in m["versions"].items() if v)])
        for m in summary["machines"]
    )
    parts = [
        "# Training with 8-bit state: what it costs in loss",
        f"`python -m benchmarks.quality`, {summary['runs_recorded']} of "
        f"{summary['runs_planned']} runs, "
        f"{summary['hours']:.1f} hours of one core ({machines}).",
    ]
    sections = [
        ("family", "Every optimizer", FAMILY_TEXT, family_table),
        ("ablation", "The codec: what blocks, the dynamic map and 32-bit embeddings are for",
         ABLATION_TEXT, ablation_table),
        ("rounding", "Second moments, to nearest and stochastically", ROUNDING_TEXT,
         rounding_table),
    ]  # fmt: skip
    for name, title, text, table in sections:
        if summary[name]:
            steps = ", ".join(f"{k.split('/')[1]} {n:,}" for k, n in summary["steps"].items()
                              if k.startswith(name + "/"))  # fmt: skip
            parts += [f"## {title}", f"{text} Steps: {steps}.", table(summary[name])]
    return "\n\n".join(parts) + "\n"


def draw(summary: dict[str, Any], path: Path) -> None:
    """Draws what the tables say, a panel for each study that has runs, to the PNG file `path`."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    studies = {"family": _draw_family, "ablation": _draw_ablation, "rounding": _draw_rounding}
    panels = [(studies[name], summary[name]) for name in studies if summary[name]]
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(9, 4.2 * len(panels)), squeeze=False, layout="constrained"
    )
    for (draw_panel, rows), panel in zip(panels, axes[:, 0], strict=True):
        draw_panel(panel, rows)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_family(panel: Any, rows: list[dict[str, Any]]) -> None:
    """8-bit minus 32-bit, on the scale of the 32-bit runs' own spread."""
    names = [f"{row['task']}, {row['rule']}" for row in rows]
    for place, row in enumerate(rows):
        exact, eight = row["sources"].get(OURS_32BIT), row["sources"].get(OURS_8BIT)
        if exact is None or eight is None or not exact["std"] or eight["difference"] is None:
            continue
        panel.barh(place, 2, left=-1, color="tab:gray", alpha=0.3)
        unit = exact["std"]
        error = (eight["difference_std"] or 0.0) / unit
        panel.errorbar(eight["difference"] / unit, place, xerr=error, fmt="o", color="tab:blue")
    panel.set_yticks(range(len(names)), names, fontsize=8)
    panel.invert_yaxis()
    panel.axvline(0, color="black", linewidth=0.6)
    panel.set_xlabel(
        "held-out loss, 8-bit minus 32-bit, same seed; in standard deviations of 32-bit (gray: one)"
    )


def _draw_ablation(panel: Any, rows: list[dict[str, Any]]) -> None:
    names = [
        row["codec"] + ("" if row["codec"] == REFERENCE else f", {row['embeddings']}")
        for row in rows
    ]
    bars = panel.barh(names, [100 * row["share_diverged"] for row in rows], color="tab:orange")
    panel.bar_label(bars, [f" {row['diverged']} of {row['runs']}" for row in rows], fontsize=8)
    panel.tick_params(axis="y", labelsize=8)
    panel.set_xlim(0, 110)
    panel.invert_yaxis()
    panel.set_xlabel("diverged runs, %")


def _draw_rounding(panel: Any, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if row["update_error"]:
            steps = list(row["update_error"])
            means = [row["update_error"][step][0] for step in steps]
            panel.plot(steps, means, label=f"{row['row']}, {row['rounding']}")
    panel.set_xlabel("step")
    panel.set_ylabel("relative error of the update")
    panel.set_ylim(bottom=0)
    panel.legend(fontsize=8)
