"""Which capacity factor a run needs: drops and memory for 1.00 to 2.00, from what its routers chose.

    python tools/capacity_advisor.py runs/demo
    python tools/capacity_advisor.py runs/demo --last 0.2

Dropless runs are asked as well as runs with a capacity. Writes RUN/capacity.html.
"""

import argparse
import sys
from pathlib import Path

from rich.table import Table
from rich.text import Text

from mmoe.commands.console import Console
from mmoe.errors import MmoeError
from mmoe.planning.capacity import FORMULA, LAST, LIMIT, CapacityAdvice, read_advice
from mmoe.reporting import figures
from mmoe.result import print_result

console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument(
        "--last", type=float, default=LAST, help="share of its steps, from the end (default: %(default)s)"
    )
    arguments = parser.parse_args()
    if not 0 < arguments.last <= 1:
        parser.error(f"--last is {arguments.last:g}; it must be above 0 and at most 1")
    try:
        advice = read_advice(arguments.run, arguments.last)
    except MmoeError as error:
        Console(stderr=True).print(Text("error", "bold red"), str(error), highlight=False, soft_wrap=True)
        sys.exit(1)
    show(advice)
    page = arguments.run / "capacity.html"
    figures.would_drop(advice).write_html(page, include_plotlyjs=True)
    console.print(f"wrote {page}", soft_wrap=True)
    print_result(
        "capacity_advisor",
        {
            "steps": [advice.first, advice.last],
            "capacity_factors": advice.factors,
            "drop_rate": dict(enumerate(advice.rates.tolist())),
            "drop_rate_overall": advice.rates_overall.tolist(),
            "rows": advice.rows.tolist(),
            "bytes": advice.bytes.tolist(),
            "smallest": dict(enumerate(advice.smallest)),
            "smallest_overall": advice.smallest_overall,
            "smallest_everywhere": advice.smallest_everywhere,
        },
        {},
    )


def show(advice: CapacityAdvice) -> None:
    layers = [f"layer {layer}" for layer in range(len(advice.rates))]
    title = f"choices dropped, steps {advice.first} to {advice.last}"
    table = Table("cf", "rows", "KiB", "of cf 1", *layers, "all layers", title=title)
    for column in table.columns:
        column.justify = "right"
    for factor, rows, size, *rates in zip(
        advice.factors, advice.rows, advice.bytes, *advice.rates, advice.rates_overall
    ):
        cells = [Text(f"{rate:.3%}", "green" if rate < LIMIT else "") for rate in rates]
        table.add_row(f"{factor:.2f}", f"{rows:,}", f"{size / 1024:,.0f}", f"{size / advice.bytes[0]:.2f}", *cells)
    console.print(table)
    console.print(FORMULA, highlight=False)
    found = list(zip(layers, advice.smallest))
    found += [("all layers together", advice.smallest_overall), ("every layer", advice.smallest_everywhere)]
    console.print(f"smallest capacity factor with less than {LIMIT:.1%} dropped:")
    for name, factor in found:
        console.print(f"  {name}: {f'above {advice.factors[-1]:.2f}' if factor is None else f'{factor:.2f}'}")


if __name__ == "__main__":
    main()
