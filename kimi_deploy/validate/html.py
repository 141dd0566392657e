"""A validation's report as one page that needs nothing else: styles and plots are inside, scripts there are none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from kimi_deploy.runtime.base import ops_run_as
from kimi_deploy.validate.plots import drift, error_by_tensor, scatter

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2433; --soft: #5d6678; --rule: #d9dde5; --page: #ffffff; --box: #f5f7fa;
  --blue: #2563a8; --grey: #9aa3b2; --red: #b42318; --green: #1a7f4b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #a3acbd; --rule: #343b49; --page: #14181f;
  --box: #1c222c; --blue: #6aa9ec; --grey: #6f7889; --red: #f0786c; --green: #57c98a; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 2rem auto;
  max-width: 1220px; padding: 0 1.25rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p, figcaption { color: var(--soft); margin: .25rem 0; max-width: 46rem; }
.pass { color: var(--green); font-weight: 600; } .fail { color: var(--red); font-weight: 600; }
.quiet { color: var(--soft); }
.failure { border-left: 4px solid var(--red); background: var(--box); padding: .75rem 1rem; margin: 1rem 0; }
code { font: 13px/1.5 ui-monospace, monospace; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .5rem; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; } th:first-child, td:first-child, th:last-child { text-align: left; }
figure { margin: 0; } .plots { display: flex; flex-wrap: wrap; gap: 1.5rem 2.5rem; }
.plots figure { flex: 2 1 560px; max-width: 720px; } .plots .square { flex: 1 1 300px; max-width: 360px; }
.plots figure { overflow-x: auto; } .plots figure:not(.square) svg { min-width: 520px; }
td:last-child { white-space: normal; min-width: 9rem; text-align: left; color: var(--soft); }
svg { width: 100%; height: auto; display: block; }
.grid { stroke: var(--rule); } .bound { stroke: var(--red); stroke-dasharray: 5 4; } .range { stroke: var(--blue); }
.mark { fill: var(--blue); fill-opacity: .55; } .wrong { fill: var(--red); fill-opacity: .9; }
.noise { fill: none; stroke: var(--grey); stroke-width: 1.5; }
polyline { fill: none; stroke-width: 1.4; } .line { stroke: var(--blue); } .noise-line { stroke: var(--grey); }
text { fill: var(--soft); font: 11.5px system-ui, sans-serif; } .label { font-size: 12.5px; }
.end { text-anchor: end; } .middle { text-anchor: middle; }
"""


def page(report: Mapping[str, Any]) -> str:
    """The page for a report of `Report.to_dict`."""
    name = f"{report.get('name', 'model')}: {report['backend']} against PyTorch"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(name)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(name)}: {_verdict(report['passed'])}</h1>{_facts(report)}{_failure(report)}"
        f"<h2>Checks</h2>{_checks(report)}<h2>Plots</h2>{_plots(report)}"
        f"<h2>Prompts</h2>{_prompts(report)}</body></html>\n"
    )


def _verdict(passed: bool) -> str:
    return '<span class="pass">pass</span>' if passed else '<span class="fail">FAIL</span>'


def _measured_with(report: Mapping[str, Any]) -> str:
    """The runtime, and of an export what ran its ops."""
    ops = f", {ops_run_as(report.get('kernels'))}" if report.get("body") else ""
    return escape(f"{report.get('runtime')}{ops}")


def _facts(report: Mapping[str, Any]) -> str:
    bound, noise = report["tolerance"], report["noise"]
    lines = [
        f"{report.get('dtype')}, {report.get('body')} bodies; measured with {_measured_with(report)} by kimi-deploy "
        f"{report.get('kimi_deploy')}; "
        f"artefact <code>{str(report.get('artefact'))[:16]}</code>, checkpoint "
        f"<code>{str(report.get('checkpoint'))[:16]}</code>.",
        f"Errors are over the largest magnitude of the tensor; allowed are {bound['peak']:g} and a cosine of "
        f"1 - {bound['cosine']:g} ({bound['name']}).",
    ]
    if bound["router_gap"]:
        lines.append(
            f"Where two experts' scores are within {bound['router_gap']:g}, PyTorch takes the one that the export took."
        )
    if noise:
        lines.append(f"PyTorch's own noise: logits rms {noise:.1e}.")
    return "".join(f"<p>{line}</p>" for line in lines)


def _failure(report: Mapping[str, Any]) -> str:
    first = report["first_failure"]
    if first is None:
        return ""
    note = f" ({first['note']})" if first["note"] else ""
    parts = [
        f"<strong>First difference:</strong> {escape(first['check'])}, prompt {escape(first['prompt'])}, "
        f"<strong>{escape(first['tensor'])}</strong>{escape(note)}"
    ]
    if first["where_to_look"]:
        parts.append(f"Where to look: {escape(first['where_to_look'])}")
    parts.append(f"<code>{escape(first['command'])}</code>")
    return f'<div class="failure">{"<br>".join(parts)}</div>'


def _checks(report: Mapping[str, Any]) -> str:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    # of 16-bit exports alone
    choices = any(line["choices"] for line in report["summary"])
    rows = []
    for line in report["summary"]:
        worst = "" if line["worst_state"] is None else f"{line['state_peak']:.1e} {line['worst_state']}"
        worst = worst if line["state_peak"] else "equal"
        verdict = _verdict(line["passed"]) if line["judged"] else '<span class="quiet">noise</span>'
        rows.append(
            [
                escape(line["check"]),
                verdict,
                str(line["comparisons"]),
                number(line["logits_peak"], ".1e"),
                number(line["logits_rms"], ".1e"),
                number(line["kl"], ".1e"),
                *(number(line[key], ".1%") for key in ("top1", "top5", "top10")),
                escape(worst),
                *([str(line["choices"] or "")] if choices else []),
                escape(line["note"]),
            ]
        )
    headers = ["check", "verdict", "compared", "logits max", "rms", "KL", "top-1", "top-5", "top-10", "worst state"]
    return _table([*headers, *(["choices"] if choices else []), ""], rows)


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{h}</th>" for h in headers)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _plots(report: Mapping[str, Any]) -> str:
    errors: dict[str, dict[str, float]] = {}
    for row in report["rows"]:
        if "peak" in row or "difference" in row:
            peak = row["difference"]["peak"] if "difference" in row else row["peak"]
            worst = errors.setdefault(row["check"], {})
            worst[row["tensor"]] = max(peak, worst.get(row["tensor"], 0.0))
    noise = next((c for c in ("reference-dtype", "reference-forms") if c in errors), None)
    errors = {c: e for c, e in errors.items() if c == noise or not c.startswith("reference")}
    bound, curves = report["tolerance"]["peak"], report["curves"]
    figures = [
        _figure(
            error_by_tensor(errors, noise, bound),
            "Error by layer: a filled mark per check, at its worst prompt; hollow marks are PyTorch's own noise. "
            "A tensor that is equal to the bit has no mark.",
        )
    ]
    if curves["drift"]:
        figures.append(
            _figure(
                drift(curves["drift"], curves["drift_noise"], bound),
                "Drift by position, along PyTorch's greedy tokens; grey: PyTorch's single steps against its one pass.",
            )
        )
    if curves["scatter"]:
        text = f"{len(curves['scatter'])} logits of the same run; on the line, both are equal."
        figures.insert(1, _figure(scatter(curves["scatter"]), text, "square"))
    return f'<div class="plots">{"".join(figures)}</div>'


def _figure(plot: str, caption: str, style: str = "") -> str:
    return f'<figure class="{style}">{plot}<figcaption>{escape(caption)}</figcaption></figure>'


def _prompts(report: Mapping[str, Any]) -> str:
    rows = [[str(i), f"{p['tokens']:,}", escape(p["name"])] for i, p in enumerate(report.get("prompts", ()))]
    return _table(["index", "tokens", "prompt"], rows)
