"""The report: one HTML file that holds its pictures, and the table in the terminal's form."""
from __future__ import annotations

import base64
import html
import math
import os
import pathlib
import string

from rich import box
from rich.table import Table

from .workload import Figure, Result, Side, Time

_PAGE = string.Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>onepass demo</title>
<style>
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5c6670; --line: #dde2e7; --page: #fff; --card: #f6f8fa;
  --ours: #0b7a75; --theirs: #a9b4bf; --bad: #b3261e;
  --loss: #9a6700; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaee; --soft: #98a3ae; --line: #30363d; --page: #101418;
  --card: #181d23; --ours: #4fc3b8; --theirs: #55606b; --bad: #ff8a80;
  --loss: #d9a441; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 62rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.9rem; margin: 0 0 .3rem; } h2 { font-size: 1.3rem; margin: 3rem 0 .2rem; }
h3 { font-size: 1rem; margin: 0 0 .2rem; }
p { margin: .3rem 0; } .soft { color: var(--soft); } small, .small { font-size: .87rem; }
.scroll { overflow-x: auto; margin-top: 1.5rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2), th:last-child, td:last-child { text-align: left; }
thead th { border-bottom: 2px solid var(--line); font-weight: 600; }
tbody tr:nth-child(odd) td, tbody tr:nth-child(odd) th { border-top: 1px solid var(--line); }
tbody th { font-weight: 600; vertical-align: top; } code { font-family: ui-monospace, Consolas, monospace; }
.win { color: var(--ours); font-weight: 600; } .loss { color: var(--loss); font-weight: 600; }
.bad { color: var(--bad); font-weight: 600; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: .25rem .75rem; align-items: center;
  margin: 1rem 0 1.2rem; font-size: .87rem; } .bars i { display: block; height: .8rem; border-radius: 2px; }
.stock { background: var(--theirs); } .onepass { background: var(--ours); }
figure { margin: 1.2rem 0 0; padding: 1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; } figcaption { margin-bottom: .7rem; }
.figures { display: flex; flex-wrap: wrap; gap: 0 1.2rem; align-items: flex-start; }
figure:has(pre) { flex: 1 1 26rem; }
figure img { max-width: 100%; height: auto; display: block; }
figure pre { margin: 0; font: .83rem/1.5 ui-monospace, Consolas, monospace; white-space: pre-wrap; }
ul { margin: .4rem 0; padding-left: 1.2rem; }
</style>
</head>
<body>
<h1>onepass demo</h1>
<p>Generative workloads end to end, stock against onepass: the same weights and the same noise on both sides.</p>
<p class="soft small">$machine</p>
<div class="scroll"><table>
<thead><tr><th>workload</th><th>part</th><th>stock</th><th>onepass</th><th>ratio</th><th>share</th><th>check</th></tr></thead>
<tbody>
$rows
</tbody></table></div>
<p class="soft small">Medians. Ratio: stock's time over onepass's, above 1 where onepass is faster;
~ where the repeats scatter more than the two sides differ. Share: the op's part
of the stock workload's time, which bounds what a faster op can bring to the whole.</p>
$sections
</body>
</html>
""")


def seconds_text(seconds: float) -> str:
    """Three significant digits in the unit that suits."""
    scale, unit = (1.0, "s") if seconds >= 1 else (1e3, "ms") if seconds >= 1e-3 else (1e6, "us")
    value = seconds * scale
    return f"{value:.{max(0, 3 - len(str(int(value))))}f} {unit}"


def _parts(result: Result) -> list[tuple[str, Time, Time, str]]:
    """(part, stock's time, onepass's time, share) of the whole and of the op."""
    share = result.stock.op.seconds / result.stock.whole.seconds
    return [
        ("whole workload", result.stock.whole, result.onepass.whole, ""),
        (result.op, result.stock.op, result.onepass.op, f"{share:.1%}"),
    ]


def ratio_text(stock: Time, onepass: Time) -> tuple[str, str]:
    """("1.25x", "win"), "loss" where onepass is slower, and ("~1.01x", "") where the margins leave it open."""
    ratio = stock.seconds / onepass.seconds
    if abs(stock.seconds - onepass.seconds) <= math.hypot(stock.margin, onepass.margin):
        return f"~{ratio:.2f}x", ""
    return f"{ratio:.2f}x", "win" if ratio > 1 else "loss"


def table(results: list[Result]) -> Table:
    """Two lines a workload, within 80 columns."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    made.add_column("")
    for title in ("stock", "onepass", "ratio", "share"):
        made.add_column(title, justify="right")
    made.add_column("check")
    for i, result in enumerate(results):
        if i:
            made.add_section()
        for j, (part, stock, onepass, share) in enumerate(_parts(result)):
            ratio, verdict = ratio_text(stock, onepass)
            style = {"win": "bold green", "loss": "yellow", "": "dim"}[verdict]
            name = f"  {part}" if j else f"[bold]{result.name}[/]"
            check = "" if j else f"[green]{result.agreement}[/]" if result.agrees else f"[red]{result.agreement}[/]"
            made.add_row(
                name, seconds_text(stock.seconds), seconds_text(onepass.seconds), f"[{style}]{ratio}[/]", share, check,
            )
    return made


def _row(name: str, part: str, stock: Time, onepass: Time, share: str, check: str) -> str:
    ratio, verdict = ratio_text(stock, onepass)
    return (
        f"<tr><th>{name}</th><td>{part}</td><td>{seconds_text(stock.seconds)}</td>"
        f'<td>{seconds_text(onepass.seconds)}</td><td class="{verdict}">{ratio}</td>'
        f"<td>{share}</td><td>{check}</td></tr>"
    )


def _rows(result: Result) -> list[str]:
    check = html.escape(result.agreement)
    check = check if result.agrees else f'<span class="bad">{check}</span>'
    whole, op = _parts(result)
    return [
        _row(html.escape(result.name), *whole, check),
        _row("", f"<code>{html.escape(op[0])}</code>", *op[1:], ""),
    ]


def _bars(stock: Side, onepass: Side, op: str) -> str:
    lines = []
    for part, a, b in (("whole", stock.whole, onepass.whole), (op, stock.op, onepass.op)):
        longest = max(a.seconds, b.seconds)
        for side, value in (("stock", a.seconds), ("onepass", b.seconds)):
            lines.append(
                f'<span>{html.escape(part)}, {side}</span><i class="{side}" style="width:{value / longest:.1%}"></i>'
                f"<span>{seconds_text(value)}</span>"
            )
    return f'<div class="bars">{"".join(lines)}</div>'


def _figure(figure: Figure) -> str:
    if isinstance(figure.content, bytes):
        data = base64.b64encode(figure.content).decode()
        width = f' width="{figure.width}"' if figure.width else ""
        content = f'<img{width} alt="{html.escape(figure.title)}" src="data:{figure.mime};base64,{data}">'
    else:
        content = f"<pre>{html.escape(figure.content)}</pre>"
    return (
        f"<figure><figcaption><h3>{html.escape(figure.title)}</h3>"
        f'<span class="soft small">{html.escape(figure.caption)}</span></figcaption>{content}</figure>'
    )


def _section(result: Result) -> str:
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in result.notes)
    figures = "\n".join(_figure(figure) for figure in result.figures)
    what = html.escape(result.what[0].upper() + result.what[1:])
    return (
        f'<section><h2>{html.escape(result.name)}</h2><p>{what}.</p><ul class="soft small">{notes}</ul>'
        f'{_bars(result.stock, result.onepass, result.op)}\n<div class="figures">{figures}</div></section>'
    )


def page(results: list[Result], machine: str) -> str:
    return _PAGE.substitute(
        machine=html.escape(machine),
        rows="\n".join(row for result in results for row in _rows(result)),
        sections="\n".join(_section(result) for result in results),
    )


def write(text: str, path: pathlib.Path) -> None:
    """`text` at `path`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
