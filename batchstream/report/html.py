"""One HTML file for a run or a measurement: figures, distributions, time line, sweep, slowest requests, definitions.

It opens from disk and asks the network for nothing: plotly.js (extra `report`) stands in it whole. Light and dark
follow the reader's system. Everything that came from outside (ids, model names, answers) is escaped as text, and in
the data for the plots `<` is spelled so that no browser can see a tag in it. Answers are left out unless asked for.
"""

from __future__ import annotations

import heapq
import html
from collections.abc import Iterable
from typing import Any

import msgspec

from batchstream.errors import UsageError
from batchstream.figures.latency import DEFINITIONS
from batchstream.figures.percentiles import Sample
from batchstream.figures.stages import FROM_DUE, BenchSummary, Stage, fold
from batchstream.figures.summary import Distribution, Summary
from batchstream.policy.arrivals import Load
from batchstream.records import Latencies, RowError, Usage
from batchstream.report.text import clean, duration, rate

SLOWEST = 20
"""Rows of the table of slowest requests."""

CURVE_POINTS = 300
"""Points of a distribution's curve; its ends are exact."""

_MANY = 1 << 62  # beyond every ordinal


class _Row(msgspec.Struct):
    row: int
    id: str
    status: str
    text: str | None = None
    timing: Latencies = Latencies()
    usage: Usage | None = None
    error: RowError | None = None


class Sheet(msgspec.Struct):
    """What the page shows of one stage (of a run: its only one), gathered from its rows."""

    stage: Stage
    ttft: Sample
    latency: Sample


def render_html(
    figures: Summary | BenchSummary, results: list[tuple[int, bytes]], title: str, *, include_text: bool = False
) -> str:
    """The page. `results`: (ordinal, result JSON) of every row. Raises UsageError where the extra is not installed."""
    script = _plotly()
    run = figures.run
    if isinstance(figures, BenchSummary):
        stages = figures.stages
    else:
        blank = Stage(name="run", load=Load(arrival="closed"), rows=(0, _MANY), summary=figures)
        stages = [msgspec.structs.replace(fold(blank, results, {}, None), summary=figures)]
    sheets, slowest = _gather(stages, results)
    verdict, reasons = figures.verdict, figures.verdict_reasons
    parts = [
        f"<h1>{_text(title)}</h1>",
        _facts(
            ("Endpoint", run.endpoint), ("Model", ", ".join(_models(stages)) or run.model), ("Started", run.started_at),
            ("Ended", run.ended_at), ("Results", run.output), ("Stopped", run.stop),
        ),
        _verdict(verdict, reasons),
        _cards(sheets),
    ]  # fmt: skip
    plots: dict[str, Any] = {}
    if len(stages) > 1:
        parts.append(_plot(plots, "sweep", "Throughput against latency", *_sweep(stages)))
    parts.append(_plot(plots, "ttft", "TTFT: share of the answers that had begun by then", *_curves(sheets, "ttft")))
    parts.append(
        _plot(plots, "latency", "Latency: share of the answers that had ended by then", *_curves(sheets, "latency"))
    )
    parts.append(_plot(plots, "line", "Time line", *_time_line(stages)))
    parts += [_percentiles(sheet.stage) for sheet in sheets]
    parts += [_slowest(slowest, include_text=include_text), _definitions(figures)]
    data = msgspec.json.encode(plots).decode().replace("<", "\\u003c")
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body><main>{''.join(parts)}</main>"
        f"<script id=plots type=application/json>{data}</script><script>{script}</script><script>{_DRAW}</script>"
        "</body></html>\n"
    )


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UsageError("--format html draws with plotly: pip install 'batchstream[report]'") from None
    # `</script` inside a string of the library would end the element.
    script: str = get_plotlyjs()
    return script.replace("</script", "<\\/script")


def _gather(stages: list[Stage], results: Iterable[tuple[int, bytes]]) -> tuple[list[Sheet], list[_Row]]:
    sheets = [Sheet(stage, Sample(), Sample()) for stage in stages]
    slowest: list[tuple[float, int, _Row]] = []
    decode = msgspec.json.Decoder(_Row).decode
    for number, data in results:
        sheet = next((s for s in sheets if s.stage.rows[0] + s.stage.warmup <= number < s.stage.rows[1]), None)
        if sheet is None:
            continue
        row = decode(data)
        if row.status == "ok":
            sheet.ttft.add(row.timing.ttft_s)
            sheet.latency.add(row.timing.latency_s)
        key = (row.timing.total_s or 0.0, -number, row)
        if len(slowest) < SLOWEST:
            heapq.heappush(slowest, key)
        elif key[:2] > slowest[0][:2]:
            heapq.heapreplace(slowest, key)
    return sheets, [row for _, _, row in sorted(slowest, key=lambda item: item[:2], reverse=True)]


# Words


def _text(value: object) -> str:
    return html.escape(clean(str(value)), quote=True)


def _facts(*facts: tuple[str, str | None]) -> str:
    told = "".join(f"<dt>{name}</dt><dd>{_text(value)}</dd>" for name, value in facts if value)
    return f"<dl class=facts>{told}</dl>"


def _verdict(verdict: str | None, reasons: list[str]) -> str:
    if verdict is None:
        return "<p class=verdict>The client did not watch itself: take the latencies as upper bounds.</p>"
    if verdict == "trusted":
        return "<p class='verdict good'>Trusted: the figures are the endpoint's, not this machine's.</p>"
    return f"<p class='verdict bad'>Degraded: {_text('; '.join(reasons))}.</p>"


def _models(stages: list[Stage]) -> list[str]:
    return list(dict.fromkeys(name for stage in stages for name in stage.summary.models))


def _cards(sheets: list[Sheet]) -> str:
    head = ["", "asked", "failed", "requests/s", "tokens/s", "TTFT p50", "TTFT p95", "TPOT p50", "latency p50",
            "latency p95", "goodput/s"]  # fmt: skip
    rows = []
    for sheet in sheets:
        stage, figures = sheet.stage, sheet.stage.summary
        metrics, good = figures.metrics, stage.goodput
        cells = [
            _text(stage.name + (f" #{stage.repeat + 1}" if stage.repeat else "")),
            f"{figures.rows.total:,}",
            f"{figures.rows.failed:,}",
            _rate(stage.requests_per_s or figures.throughput.rows_per_s),
            _rate(figures.throughput.completion_tokens_per_s),
            _time(metrics["ttft_s"].p50),
            _time(metrics["ttft_s"].p95),
            _time(metrics["tpot_s"].p50),
            _time(metrics["latency_s"].p50),
            _time(metrics["latency_s"].p95),
            "–" if good is None else f"{_rate(good.per_second)} ({good.attainment:.1%})",
        ]
        rows.append("".join(f"<td>{cell}</td>" for cell in cells))
    return _table("Stages" if len(sheets) > 1 else "In short", head, rows)


def _percentiles(stage: Stage) -> str:
    head = ["", "n", "p50", "p90", "p95", "p99", "p99.9", "max", "mean"]
    shown = {name: found for name, found in {**stage.summary.metrics, **stage.sched}.items() if found.n}
    rows = [
        f"<td>{_text(name.removesuffix('_s'))}</td><td>{found.n:,}</td>"
        + "".join(f"<td>{_interval(found, label)}</td>" for label in ("p50", "p90", "p95", "p99", "p99_9"))
        + f"<td>{_time(found.max)}</td><td>{_time(found.mean)}</td>"
        for name, found in shown.items()
    ]
    return _table(f"Percentiles, {_text(stage.name)}, with 95 % confidence intervals", head, rows)


def _interval(found: Distribution, label: str) -> str:
    value = getattr(found, label)
    if value is None:
        return f"<span title='{_text(found.refused.get(label, ''))}'>–</span>"
    if label not in found.intervals:
        return _time(value)
    low, high = found.intervals[label]
    return f"{_time(value)}<small>{_time(low)} … {_time(high)}</small>"


def _slowest(rows: list[_Row], *, include_text: bool) -> str:
    head = ["row", "id", "total", "TTFT", "latency", "tokens", "ended", *(["answer"] if include_text else [])]
    lines = []
    for row in rows:
        tokens = row.usage.completion_tokens if row.usage is not None else None
        ended = row.status if row.error is None else row.error.kind
        cells = [
            f"{row.row:,}", _text(row.id), _time(row.timing.total_s), _time(row.timing.ttft_s),
            _time(row.timing.latency_s), "–" if tokens is None else f"{tokens:,}", _text(ended),
        ]  # fmt: skip
        if include_text:
            cells.append(f"<div class=answer>{_text((row.text or '')[:2000])}</div>")
        lines.append("".join(f"<td>{cell}</td>" for cell in cells))
    return _table("Slowest requests", head, lines)


def _definitions(figures: Summary | BenchSummary) -> str:
    told = {name: text for name, text in DEFINITIONS.items() if name != "ttfc_s"}
    if isinstance(figures, BenchSummary):
        told |= {name: text for name, (_, text) in FROM_DUE.items()}
    items = "".join(f"<dt>{_text(name.removesuffix('_s'))}</dt><dd>{_text(text)}</dd>" for name, text in told.items())
    where = figures.environment if isinstance(figures, BenchSummary) else {}
    machine = " · ".join(f"{name} {value}" for name, value in where.items())
    note = (
        "sent: just before the request is written. Durations are of answered rows; failed ones improve no percentile."
    )
    return f"<h2>Definitions</h2><p>{note}</p><dl class=facts>{items}</dl><p class=dim>{_text(machine)}</p>"


def _table(heading: str, head: list[str], rows: list[str]) -> str:
    heads = "".join(f"<th>{name}</th>" for name in head)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f"<h2>{heading}</h2><div class=wide><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds >= 60.0:
        return duration(seconds)
    return f"{seconds:.2f} s" if seconds >= 1.0 else f"{seconds * 1e3:,.{0 if seconds >= 0.1 else 1}f} ms"


def _rate(value: float | None) -> str:
    return "–" if value is None else rate(value)


# Plots


def _plot(plots: dict[str, Any], name: str, heading: str, data: list[dict[str, Any]], layout: dict[str, Any]) -> str:
    if not data:
        return ""
    plots[name] = {"data": data, "layout": layout}
    return f"<h2>{heading}</h2><div class=plot id=plot-{name}></div>"


def _curves(sheets: list[Sheet], which: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    data = []
    for sheet in sheets:
        sample: Sample = getattr(sheet, which)
        if sample.n < 2:
            continue
        shares = [place / CURVE_POINTS for place in range(CURVE_POINTS + 1)]
        values = [(sample.at(share) or 0.0) * 1e3 for share in shares]
        data.append({
            "x": values, "y": [100 * share for share in shares], "name": clean(sheet.stage.name), "mode": "lines",
            "line": {"shape": "hv"}, "hovertemplate": "%{y:.1f} % within %{x:.3~f} ms",
        })  # fmt: skip
    return data, {"xaxis": {"title": "milliseconds", "rangemode": "tozero"}, "yaxis": {"title": "% of answers"},
                  "showlegend": len(data) > 1}  # fmt: skip


def _sweep(stages: list[Stage]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    order = sorted(stages, key=lambda stage: stage.load.level)
    rates = [stage.requests_per_s for stage in order]
    names = [clean(stage.name) for stage in order]
    data: list[dict[str, Any]] = []
    for metric, label in (("ttft_s", "TTFT"), ("latency_s", "latency")):
        for percentile in ("p50", "p95"):
            values = [getattr(stage.summary.metrics[metric], percentile) for stage in order]
            if any(value is not None for value in values):
                data.append({
                    "x": rates, "y": [None if v is None else v * 1e3 for v in values], "text": names,
                    "name": f"{label} {percentile}", "mode": "lines+markers",
                    "hovertemplate": "%{text}: %{y:.1f} ms at %{x:.3~f}/s",
                })  # fmt: skip
    good = next((stage.goodput for stage in order if stage.goodput is not None), None)
    limits = [] if good is None else [(name, s) for name, s in good.slo.items() if name in ("ttft", "latency", "total")]
    shapes = [{"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": s * 1e3, "y1": s * 1e3,
               "line": {"dash": "dot", "width": 1.5, "color": "#d1495b"}} for _, s in limits]  # fmt: skip
    notes = [{"xref": "paper", "x": 1, "xanchor": "right", "y": s * 1e3, "yanchor": "bottom", "showarrow": False,
              "text": f"objective: {name} ≤ {s * 1e3:g} ms"} for name, s in limits]  # fmt: skip
    return data, {"xaxis": {"title": "answers a second", "rangemode": "tozero"},
                  "yaxis": {"title": "milliseconds", "rangemode": "tozero"}, "shapes": shapes,
                  "annotations": notes, "showlegend": True}  # fmt: skip


def _time_line(stages: list[Stage]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Three panels over one time axis; the stages one after the other."""
    at: list[float | None] = []
    ttft: list[float | None] = []
    tokens: list[float | None] = []
    in_flight: list[float | None] = []
    failed: list[float | None] = []
    begin = 0.0
    for stage in stages:
        for point in stage.timeline:
            at.append(begin + point.at)
            ttft.append(None if point.ttft_p50_s is None else point.ttft_p50_s * 1e3)
            tokens.append(point.tokens_per_s)
            in_flight.append(point.in_flight)
            failed.append(point.failed)
        begin += (stage.seconds or 0.0) + 1.0
        for values in (at, ttft, tokens, in_flight, failed):
            values.append(None)  # a gap between two stages
    if not any(stage.timeline for stage in stages):
        return [], {}

    def panel(values: list[float | None], name: str, axis: str, **more: Any) -> dict[str, Any]:
        return {"x": at, "y": values, "name": name, "yaxis": axis, "connectgaps": False, "mode": "lines", **more}

    data = [
        panel(ttft, "TTFT p50, ms", "y3", mode="lines+markers", marker={"size": 4}),
        panel(tokens, "completion tokens/s", "y2"),
        panel(in_flight, "in flight", "y", line={"shape": "hv"}),
        panel(failed, "failed", "y", mode="markers", marker={"color": "#d1495b", "size": 5}),
    ]
    data[3]["y"] = [value or None for value in failed]  # none is not shown
    return data, {
        "height": 560, "xaxis": {"title": "seconds", "rangemode": "tozero"}, "showlegend": True,
        "yaxis": {"title": "requests", "domain": [0, 0.28], "rangemode": "tozero"},
        "yaxis2": {"title": "tokens/s", "domain": [0.36, 0.64], "rangemode": "tozero"},
        "yaxis3": {"title": "ms", "domain": [0.72, 1], "rangemode": "tozero"},
    }  # fmt: skip


_STYLE = """
:root{--bg:#fff;--fg:#1d2530;--dim:#667;--line:#dde1e7;--card:#f6f7f9;--good:#1b7f4b;--bad:#b4232f}
@media(prefers-color-scheme:dark){:root{--bg:#14181f;--fg:#e4e8ee;--dim:#98a2b0;--line:#2c333e;--card:#1b2029;--good:#5fd39a;
--bad:#ff8d8d}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,sans-serif}
main{max-width:1080px;margin:0 auto;padding:24px 20px 60px}h1{font-size:24px;margin:0 0 12px;overflow-wrap:anywhere}
h2{font-size:17px;margin:34px 0 8px}.facts{display:grid;grid-template-columns:max-content 1fr;gap:2px 16px;margin:0}
.facts dt{color:var(--dim)}.facts dd{margin:0;overflow-wrap:anywhere}.verdict{padding:10px 14px;
border-left:4px solid var(--dim);background:var(--card)}
.good{border-color:var(--good)}.bad{border-color:var(--bad)}.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;min-width:100%}th,td{padding:5px 12px;text-align:right;
border-bottom:1px solid var(--line);white-space:nowrap;vertical-align:top}
th{color:var(--dim);font-weight:500;font-size:13px}
th:first-child,td:first-child{text-align:left;padding-left:0}small{display:block;color:var(--dim);font-size:11.5px}
.plot{min-height:360px}.dim{color:var(--dim)}
.answer{white-space:pre-wrap;text-align:left;min-width:320px;max-width:560px}
""".replace("\n", "")

_DRAW = """
(function(){
 var plots=JSON.parse(document.getElementById('plots').textContent);
 var dark=window.matchMedia('(prefers-color-scheme: dark)');
 function draw(){
  var css=getComputedStyle(document.documentElement),fg=css.getPropertyValue('--fg').trim(),
      line=css.getPropertyValue('--line').trim();
  var colours=dark.matches?['#6db3f2','#f2b56d','#7fd6a4','#d79bf0','#f28f8f','#9fd8e8']
                          :['#1f6fb2','#c46a12','#1b7f4b','#7c3fa8','#b4232f','#2b8ca0'];
  Object.keys(plots).forEach(function(name){
   var spec=JSON.parse(JSON.stringify(plots[name])),layout=spec.layout;
   Object.assign(layout,{paper_bgcolor:'rgba(0,0,0,0)',plot_bgcolor:'rgba(0,0,0,0)',colorway:colours,
    font:{color:fg,family:'system-ui, sans-serif',size:13},margin:{l:70,r:20,t:30,b:50},height:layout.height||360,
    legend:{orientation:'h',x:0,y:1.02,yanchor:'bottom'},hovermode:'closest'});
   Object.keys(layout).forEach(function(key){if(/^[xy]axis/.test(key)){var a=layout[key];
    if(typeof a.title==='string')a.title={text:a.title};a.gridcolor=line;a.zerolinecolor=line;a.automargin=true;}});
   Plotly.react('plot-'+name,spec.data,layout,{responsive:true,displayModeBar:false});
  });
 }
 draw();dark.addEventListener('change',draw);
})();
"""
