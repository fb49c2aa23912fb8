"""multifire summary: print a network's layers, parameters, operations, energy and memory."""

import argparse
from typing import TYPE_CHECKING

from multifire.cli.options import add_code
from multifire.cli.output import print_lines, print_table

if TYPE_CHECKING:
    from multifire.experiments.summary import Summary


def add_parser(commands) -> None:
    """Add the command and its options to the parser."""
    parser = commands.add_parser("summary", help="print a network's layers, parameters, operations, energy and memory")
    parser.add_argument("what", metavar="RECIPE|RUN", help="recipe, or run folder")
    add_code(parser)
    parser.add_argument("--root", help="folder of the data sets (default: the recipe's or the run's)")
    parser.set_defaults(run=summary)


def summary(args: argparse.Namespace) -> int:
    """Print the table of layers, the energy of an inference, and the memory that training needs."""
    from multifire.experiments.summary import summarise

    print_summary(summarise(args.what, args.root))
    return 0


def print_summary(summary: "Summary") -> None:
    """Print the summary that `multifire.experiments.summary.summarise` returned."""
    cfg, energy, counted = summary.cfg, summary.energy, not summary.missing_data
    title = f"{cfg.model.name}, width {cfg.model.width}, K = {cfg.model.levels}, T = {cfg.data.timesteps}"
    rows = []
    for row in summary.rows:
        figures = [f"{row.parameters:,}", f"{row.ann_macs:,}"]
        if row.synops is not None:
            figures += [f"{row.synops:,.0f}", f"{row.macs:,.0f}"]
        rows.append([row.name, "×".join(map(str, row.shape)), *figures])
    totals = [f"{summary.parameters:,}", f"{energy.ann_macs:,}"]
    totals += [f"{energy.synops:,.0f}", f"{energy.macs:,.0f}"] * counted
    head = ["layer", "output", "parameters", "ANN MACs", *(("SynOps", "MACs") * counted)]
    print_table(head, [*rows, ["all", "", *totals]], title=f"{title}; {summary.source}", text_columns=2, total=True)
    batch = f"batches of {cfg.optim.batch_size}" + f" in {cfg.optim.accumulate} parts" * (cfg.optim.accumulate > 1)
    print_lines([
        "ANN MACs: one pass of the same network without time. SynOps and MACs: one inference of the spiking network; "
        f"inputs that are not integers cost MACs (mean of {energy.samples} test samples)"
        if counted
        else f"SynOps are not counted, because the data are missing: {summary.missing_data}",
        f"energy at {energy.ac_pj} pJ/AC and {energy.mac_pj} pJ/MAC (45 nm): "
        + f"this network {energy.snn_pj / 1e6:,.2f} µJ, " * counted
        + f"without time {energy.ann_pj / 1e6:,.2f} µJ, with {cfg.model.levels + 1} levels of activation "
        f"{energy.quantised_pj / 1e6:,.2f} µJ",
        f"training in {batch}: {summary.kept_bytes / 1e6:,.0f} MB kept for the backward pass, "
        f"{summary.state_bytes / 1e6:,.0f} MB of weights, gradients and the optimiser's moments",
    ])  # fmt: skip
