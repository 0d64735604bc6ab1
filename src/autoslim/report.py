"""A run as one page for people: self-contained HTML with charts, readable without a network connection.

Figures are plain dicts in plotly's JSON form, drawn in the browser by the plotly.js that the page carries. Whatever
comes from the record is text to be escaped: by `escape` for HTML, by `_label` for plotly, whose labels know some HTML.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from importlib.util import find_spec
from string import Template
from typing import Any

from autoslim.errors import ExportError
from autoslim.space import Widths

_INK, _SOFT, _GRID = "#1f2733", "#566072", "#e8ebf0"
_RETRAINED, _UNIFORM, _FOUND, _SEARCH = "#1d5fbf", "#b8500c", "#0b7a75", "#858d9b"
_BUDGET_COLOURS = ("#7a3fb0", "#0b7a75", "#b02a5b", "#6b6a12", "#2f6db5", "#a3541a", "#4b5563", "#1b7f3b")
_KEPT_SCALE = [[0, "#f4f8fe"], [1, "#6aa0ea"]]  # report.css shows the same; dark text is readable on all of it
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_METRICS = {
    "macs": "MACs",
    "params": "parameters",
    "memory": "memory",
    "peak_memory": "peak memory",
    "latency_ms": "latency",
}
_LOSS = 0.01  # accuracy that a net may lose and still be called as good as the full net
_FOLD = 12  # names in one cell before the rest is folded away

Record = Mapping[str, Any]
Figure = dict[str, Any]
_Point = tuple[float, float | None, str]  # x, y (None: not measured) and the text shown at it

_HEADS = {
    "supernet": "Supernet<small>widest net</small>",
    "found": "Found",
    "retrained": "Retrained",
    "uniform": "Uniform",
    "gain": "Gain<small>points over uniform</small>",
}
_TERMS = {
    "Supernet": "The full network, trained so that it works at every width at once. Its accuracy is that of its widest "
    "net (“full net”).",
    "Found": "The net the search chose, cut out of the supernet and not trained further.",
    "Retrained": "The same net trained on its own at its final widths: the net you would use.",
    "Uniform": "The simple alternative, for comparison: every layer narrowed by one ratio to the same MACs, then "
    "trained in the same way.",
}
_MACS_TERM = "Multiply-accumulate operations for one image; papers often call them FLOPs."
_STEPS = {
    "Train one supernet.": "In every step the full net, the narrowest one and some of random widths are trained "
    "together on shared weights, so that a net of any widths can be judged without training it.",
    "Slim greedily.": "Starting from the full net, each layer in turn is tried a little narrower on held-out images; "
    "the cut that hurts least is kept. This repeats until every budget is met, so one pass finds the nets of all "
    "budgets.",
    "Retrain.": "Each net found is cut out as an ordinary network and trained at its final widths.",
    "Compare.": "A net with every layer narrowed by the same ratio, with as many MACs, is trained in the same way. "
    "What the found net gains over it is what choosing widths per layer is worth.",
}


@dataclass(frozen=True)
class _Given:
    """A system of the papers whose widths are given, not searched: what it is, how it is trained, who wrote of it."""

    noun: str
    trained: str
    paper: str


_S_NET = "Slimmable Neural Networks</cite> (Yu and others, 2018)"
_US_NET = "Universally Slimmable Networks and Improved Training Techniques</cite> (Yu and Huang, 2019)"
_GIVEN = {
    "i-net": _Given(
        "separate nets (I-Nets)",
        "Each width is a network of its own, trained by itself from scratch; no weights are shared.",
        _S_NET,
    ),
    "s-net": _Given(
        "one slimmable net (S-Net)",
        "All widths share their weights, and each has BatchNorm layers of its own; in every step the losses of all "
        "widths are added. A width is chosen while the net is in use.",
        _S_NET,
    ),
    "shared-bn": _Given(
        "one slimmable net whose widths share BatchNorm",
        "All widths share their weights and their BatchNorm layers. The running statistics mix all widths and fit "
        "none: the ablation of the paper, whose accuracies are expected to be poor.",
        _S_NET,
    ),
    "us-net": _Given(
        "one universally slimmable net (US-Net)",
        "In every step the widest net, the narrowest one and some of random ratios are trained on shared weights, the "
        "narrower ones from the output of the widest. BatchNorm statistics are measured afterwards for each width, and "
        "could be for any other.",
        _US_NET,
    ),
    "nonuniform-us-net": _Given(
        "one universally slimmable net of independent widths",
        "In every step the widest net, the narrowest one and some whose layers have independent random widths are "
        "trained on shared weights, the narrower ones from the output of the widest: the supernet that AutoSlim "
        "searches. BatchNorm statistics are measured afterwards for each width.",
        _US_NET,
    ),
}


def has_plotly() -> bool:
    """Is the package of the extra `autoslim[report]` installed?"""
    return find_spec("plotly") is not None


def render_report(record: Record) -> str:
    """One HTML page about a run, complete in itself: it loads nothing from anywhere.

    `record` sums the run up in JSON types: name, model, data, full, groups, subnets, path, training, frozen, and where
    it ran; `system` if its widths were given and not searched. Figures that were not measured are None. Raises
    `ExportError` without the extra `autoslim[report]`.
    """
    if not isinstance(record, Mapping):
        raise ExportError(
            f"render_report takes what sums a run up, a mapping, got {record!r}; `autoslim report RUN` writes its page"
        )
    figures: dict[str, Figure] = {}
    content = {
        "title": f"{escape(str(record['name']))}: AutoSlim report",
        "kicker": " · ".join(escape(part) for part in (str(record["name"]), _date(record)) if part),
        "headline": _headline(record),
        "lead": _lead(record),
        "tiles": _tiles(record),
        "tradeoff": _tradeoff_part(record, figures),
        "terms": _terms(record),
        "heads": "".join(f'<th scope="col">{head}</th>' for head in _heads(record).values()),
        "accuracies": len(_heads(record)),
        "results": _results_rows(record),
        "costs": len(_columns(record)),
        "peak": '<th scope="col">Peak memory<small>bytes</small></th>' if "peak_memory" in _columns(record) else "",
        "device": escape(_measured_on(record)),
        "channels": _channels_part(record, figures),
        "nets": _nets_part(record),
        "training": _training_part(record, figures),
        "search": _search_part(record, figures),
        "frozen": _frozen_part(record),
        "method": _method(record),
        "provenance": _provenance(record),
        "config": escape(str(record["config_yaml"])),
    }
    widths = [Widths(subnet["widths"]).to_json() for subnet in record["subnets"]]
    return Template(_asset("report.html")).substitute(
        content,
        css=_asset("report.css"),
        js=_asset("report.js"),
        plotly=_plotly_js(),
        data=_script_json({"figures": figures, "widths": widths}),
    )


def _plotly_js() -> str:
    if not has_plotly():
        raise ExportError("the report needs plotly: pip install 'autoslim[report]'")
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs()).replace("</script", "<\\/script")


def _asset(name: str) -> str:
    return (files("autoslim") / "assets" / name).read_text(encoding="utf-8")


def _script_json(value: Any) -> str:
    """JSON that may stand inside a script element: no text in it can end the element, nor begin a comment."""
    text = json.dumps(_finite(value), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    """`value` with None for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- numbers and names in words ----------------------------------------------------------------------------------


def _count(amount: float | None) -> str:
    """1234567 -> 1.23M."""
    if amount is None:
        return "unknown"
    for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if amount >= scale:
            return f"{amount / scale:.3g}{letter}" if amount < 1000 * scale else f"{amount / scale:,.0f}{letter}"
    return f"{amount:.4g}"


def _percent(share: float | None, missing: str = "not trained") -> str:
    return missing if share is None else f"{share:.1%}"


def _share(part: float | None, whole: float | None) -> str:
    """The part in per cent of the whole, to two figures below ten."""
    if part is None or not whole:
        return "unknown"
    return f"{part / whole:.0%}" if part >= 0.095 * whole else f"{100 * part / whole:.2g}%"


def _points(difference: float) -> str:
    """A difference of accuracies, rounded as it is shown: 1.4 points."""
    amount = f"{abs(100 * difference):.1f}"
    return f"{amount} point" if amount == "1.0" else f"{amount} points"


def _signed(difference: float) -> str:
    amount = f"{100 * difference:+.1f}"
    return "±0.0" if amount in ("+0.0", "-0.0") else amount.replace("-", "−")


def _milliseconds(latency: float | None) -> str:
    return "not measured" if latency is None else f"{latency:.3g} ms" if latency < 100 else f"{latency:,.0f} ms"


def _measured_on(record: Record) -> str:
    """Runtime and device of latencies; plain torch goes without saying."""
    runtime = record.get("runtime") or "torch"
    return str(record["device"]) if runtime == "torch" else str(runtime)


def _label(text: object) -> str:
    """Text for a plotly label, which understands some HTML."""
    return escape(" ".join(str(text).split()), quote=False)


def _shortened(name: str, length: int) -> str:
    """At most `length` characters, the end rather than the beginning."""
    name = " ".join(name.split())
    return name if len(name) <= length else f"{name[: length // 3]}…{name[length // 3 + 1 - length :]}"


def _layer_names(names: Sequence[str], length: int) -> list[str]:
    """Names of layers in at most `length` characters: features.3.conv as f.3.conv, as many parts of all as must be."""
    parts = [name.split(".") for name in names]
    short = [*names]
    for depth in range(1, max(map(len, parts))):
        if max(map(len, short)) <= length:
            break
        initials = [[p if p.isdigit() else p[:1] for p in own[:-1][:depth]] for own in parts]
        short = [".".join(begin + own[len(begin) :]) for begin, own in zip(initials, parts, strict=True)]
    return [_shortened(name, length) for name in short]


def _date(record: Record) -> str:
    """Empty if it is not known: a configuration written by hand may be taken for a run's."""
    return str(record.get("date", ""))[:16].replace("T", " ")


def _plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


# --- systems that search and systems that do not ------------------------------------------------------------------


def _given(record: Record) -> _Given | None:
    """What the run trained, if its widths were given; None for AutoSlim, which searches them."""
    return _GIVEN.get(record.get("system", "autoslim"))


def _noun(record: Record) -> str:
    """What a net is called after: the budget it was found for, or the width it was given."""
    return "width" if _given(record) else "budget"


def _heads(record: Record) -> Mapping[str, str]:
    """The accuracies that the table shows, by kind."""
    if _given(record) is None:
        return _HEADS
    return {"retrained" if record["system"] == "i-net" else "found": "At its width"}


def _terms(record: Record) -> str:
    terms = {"MACs": _MACS_TERM}
    if _given(record) is None:
        budget = (
            f"The limit a net was searched for. A bare share such as “50%” is one of the full net’s {_metric(record)}."
        )
        terms = {**_TERMS, **terms, "Budget": budget}
    else:
        terms["Width"] = "The share of its channels that every layer keeps, rounded to a width the layer may have."
    return "\n".join(f"<dt>{term}</dt><dd>{meaning}</dd>" for term, meaning in terms.items())


def _method(record: Record) -> str:
    given = _given(record)
    if given is not None:
        trained = f"<p>The widths were given, not searched. {given.trained}</p>"
        return f"{trained}\n<p>The method is from <cite>{given.paper}.</p>"
    steps = "\n".join(f"<li><strong>{name}</strong> {text}</li>" for name, text in _STEPS.items())
    return (
        f'<ol class="steps">\n{steps}\n</ol>\n<p>The method is <cite>AutoSlim: Towards One-Shot Architecture Search '
        "for Channel Numbers</cite> (Yu and Huang, 2019).</p>"
    )


def _metric(record: Record) -> str:
    return escape(_METRICS.get(record["metric"], str(record["metric"])))


# --- the headline ------------------------------------------------------------------------------------------------


def _accuracy(subnet: Record) -> float | None:
    """What the net reaches as far as it was taken: retrained, or as found."""
    accuracy = subnet["accuracy"]
    retrained: float | None = accuracy.get("retrained")
    return accuracy.get("found") if retrained is None else retrained


def _best(record: Record) -> Record | None:
    """The best trade: the net of fewest MACs that is as good as the full net, or else the most accurate one."""
    known = [subnet for subnet in record["subnets"] if _accuracy(subnet) is not None]
    if not known:
        first: Record | None = record["subnets"][0] if record["subnets"] else None
        return first
    full = record["full"].get("accuracy")
    as_good = [s for s in known if full is not None and (_accuracy(s) or 0) >= full - _LOSS]
    best: Record = (
        min(as_good, key=lambda subnet: float(subnet["macs"]))
        if as_good
        else max(known, key=lambda subnet: _accuracy(subnet) or 0.0)
    )
    return best


def _headline(record: Record) -> str:
    model = escape(str(record["model"]).rpartition(":")[2] or str(record["model"]))
    best = _best(record)
    if best is None:
        return f"{model}: no net has been found yet"
    share = _share(best["macs"], record["full"]["macs"])
    if _accuracy(best) is None:
        return f"{model} slimmed to {share} of its MACs"
    state = "" if _is_final(best, record) else " before retraining"
    return f"{model} with {share} of its MACs: {_percent(_accuracy(best))} accuracy{state}"


def _is_final(subnet: Record, record: Record) -> bool:
    """Is nothing left to be trained?"""
    return _given(record) is not None or subnet["accuracy"].get("retrained") is not None


def _lead(record: Record) -> str:
    data, given = record["data"], _given(record)
    model, nets = f"<code>{escape(str(record['model']))}</code>", _plural(len(record["subnets"]), _noun(record))
    what = f"AutoSlim chose how many channels each layer of {model} keeps, for {nets}."
    purpose = "to guide the search"
    if given is not None:
        what = f"{model} at {nets}, as {given.noun}; the widths were given, not searched."
        purpose = "to watch the training"
    what += (
        f" The data is {escape(str(data['source']))}, {data['classes']:,} "
        f"classes: {data['train']:,} images for training, {data['holdout']:,} held out {purpose}, and "
        f"{data['test']:,} test images for the accuracies on this page."
    )
    best = _best(record)
    return f'<p class="lead">{what}</p>' + (f'<p class="lead">{_trade(best, record)}</p>' if best else "")


def _trade(best: Record, record: Record) -> str:
    full, accuracy = record["full"], _accuracy(best)
    macs, params = (_share(best[metric], full[metric]) for metric in ("macs", "params"))
    name = f"<strong>{escape(best['budget'])}</strong>"
    text = (
        f"The best trade is the net {'for the budget' if _given(record) is None else 'at'} {name}: it keeps {macs} of "
        f"the MACs and {params} of the parameters"
    )
    if accuracy is None:
        return f"{text}. Its accuracy has not been measured yet."
    text += f" and classifies {_percent(accuracy)} of the test images correctly"
    if not _is_final(best, record):
        text += " without having been retrained"
    if full.get("accuracy") is not None and (_given(record) is None or best["macs"] < full["macs"]):
        change = accuracy - full["accuracy"]
        compared = f"{_points(change)} {'more' if change > 0 else 'less'} than"
        if _signed(change) == "±0.0":
            compared = "as many as"
        whole = "the full net inside the supernet" if _given(record) is None else "the widest net"
        state = ", not retrained" if _given(record) is None else ""
        text += f", {compared} {whole} ({_percent(full['accuracy'])}{state})"
    return f"{text}. {_against_uniform(best, record)}" if _given(record) is None else f"{text}."


def _against_uniform(subnet: Record, record: Record) -> str:
    gain = _gain(subnet)
    if gain is None:
        return "No uniformly narrowed net was trained for comparison."
    text = f"A uniformly narrowed net of equal MACs gets {_percent(subnet['accuracy']['uniform'])}: "
    if _signed(gain) == "±0.0":
        return f"{text}choosing the widths layer by layer made no difference here."
    text += f"choosing the widths layer by layer {'gained' if gain > 0 else 'lost'} {_points(gain)}"
    return f"{text}, which may be chance." if abs(gain) < _chance(record) else f"{text}."


def _gain(subnet: Record) -> float | None:
    """Accuracy of the retrained net minus that of the uniform one."""
    retrained, uniform = subnet["accuracy"].get("retrained"), subnet["accuracy"].get("uniform")
    return None if retrained is None or uniform is None else float(retrained - uniform)


def _chance(record: Record) -> float:
    """The difference of two accuracies that the choice of test images alone explains, at 95%.

    Binomial, both nets taken as independent, which errs to the side of caution.
    """
    both = [a for subnet in record["subnets"] for a in (_accuracy(subnet), subnet["accuracy"].get("uniform"))]
    accuracies = [accuracy for accuracy in both if accuracy is not None]
    if not accuracies or not record["data"]["test"]:
        return 0.0
    mean = sum(accuracies) / len(accuracies)
    return 1.96 * math.sqrt(2 * mean * (1 - mean) / record["data"]["test"])


def _tiles(record: Record) -> str:
    best, full = _best(record), record["full"]
    if best is None:
        return ""
    gain = _gain(best)
    tiles = [
        ("Test accuracy", _percent(_accuracy(best)), f"full net {_percent(full.get('accuracy'), 'unknown')}"),
        ("Against uniform widths", "–" if gain is None else _signed(gain), "points at equal MACs"),
        ("MACs per image", _count(best["macs"]), f"{_share(best['macs'], full['macs'])} of {_count(full['macs'])}"),
        ("Parameters", _count(best["params"]), f"{_share(best['params'], full['params'])} of {_count(full['params'])}"),
    ]
    if _given(record) is not None:
        del tiles[1]
    elif gain is None:
        tiles[1] = ("Against uniform widths", "–", "no uniform net was trained")
    if best.get("latency_ms") is not None:
        beside = f"full net {_milliseconds(full.get('latency_ms'))}"
        tiles.append((f"Latency, {escape(_measured_on(record))}", _milliseconds(best["latency_ms"]), beside))
    shown = (
        f'<div><dt>{name}</dt><dd class="figure">{figure}</dd><dd class="beside">{beside}</dd></div>'
        for name, figure, beside in tiles
    )
    return f'<dl class="tiles" aria-label="The best trade: {_named(best, record)}">{"".join(shown)}</dl>'


def _named(subnet: Record, record: Record) -> str:
    """A net as it is called in a sentence: budget 25%, or width 0.5, which says so itself."""
    return escape(subnet["budget"]) if _given(record) else f"budget {escape(subnet['budget'])}"


# --- charts ------------------------------------------------------------------------------------------------------


def _chart(name: str, title: str, height: int, *, style: str = "") -> str:
    return (
        f'<div class="chart" id="chart-{name}" role="img" aria-label="{escape(title)}" '
        f'style="height:{height}px;{style}"></div>'
    )


def _layout(x: Figure, y: Figure, **more: Any) -> Figure:
    axis = {
        "gridcolor": _GRID,
        "zeroline": False,
        "automargin": True,
        "showline": True,
        "linecolor": "#c6ccd6",
        "ticks": "",
    }
    for own in (x, y):
        if "title" in own:
            own["title"]["font"] = {"size": 13, "color": _SOFT}
    return {
        "font": {"family": _FONT, "size": 13, "color": _INK},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 8, "r": 16, "t": 16, "b": 8},
        "showlegend": False,
        "hovermode": "closest",
        "hoverdistance": 24,
        "hoverlabel": {
            "bgcolor": "#ffffff",
            "bordercolor": "#aab4c4",
            "align": "left",
            "font": {"family": _FONT, "size": 13, "color": _INK},
        },
        "xaxis": axis | x,
        "yaxis": axis | y,
        **more,
    }


def _trace(name: str, points: Iterable[_Point], marker: Figure, **more: Any) -> Figure:
    """A scatter trace of (x, y, hover text); a point without y is left out."""
    kept = [point for point in points if point[1] is not None]
    return {
        "type": "scatter",
        "name": name,
        "x": [x for x, _, _ in kept],
        "y": [y for _, y, _ in kept],
        "hovertext": [text for _, _, text in kept],
        "hoverinfo": "text",
        "mode": "markers",
        "marker": marker,
        "cliponaxis": False,
        **more,
    }


def _key(charts: str, traces: Sequence[tuple[str, Figure]]) -> str:
    """A legend of buttons that show and hide; the traces are those of the same number in every one of `charts`."""
    buttons = (
        f'<button type="button" aria-pressed="true" data-charts="{charts}" data-trace="{number}">'
        f"{_swatch(trace)}{escape(name)}</button>"
        for number, (name, trace) in enumerate(traces)
    )
    return f'<div class="key" role="group" aria-label="Show or hide">{"".join(buttons)}</div>'


def _swatch(trace: Figure) -> str:
    """The line and marker of a trace as a small drawing."""
    line, marker = trace.get("line", {}), trace.get("marker", {})
    dash = {"dot": ' stroke-dasharray="2 3"', "dash": ' stroke-dasharray="5 3"'}.get(line.get("dash", ""), "")
    drawn = ""
    if "lines" in trace["mode"]:
        drawn += f'<line x1="1" y1="7" x2="25" y2="7" stroke="{line["color"]}" stroke-width="2"{dash}/>'
    if "markers" in trace["mode"]:
        colour = marker["color"]
        drawn += {
            "circle": f'<circle cx="13" cy="7" r="{min(5, marker["size"] / 2)}" fill="{colour}"/>',
            "square-open": f'<rect x="9" y="3" width="8" height="8" fill="#fff" stroke="{colour}" stroke-width="2"/>',
            "diamond": f'<path d="M13 1l6 6-6 6-6-6z" fill="{colour}"/>',
            "star": f'<path d="M13 0l2 5h5l-4 3.3 1.4 5L13 10.5l-4.4 2.8 1.4-5L6 5h5z" fill="{colour}"/>',
        }[marker["symbol"]]
    return f'<svg width="26" height="14" viewBox="0 0 26 14" aria-hidden="true">{drawn}</svg>'


def _figure(traces: Iterable[Figure], layout: Figure, narrow: Figure | None = None) -> Figure:
    return {"data": list(traces), "layout": layout, "narrow": narrow or {}}


def _is_loss(record: Record) -> bool:
    return "accuracy" not in record["score_name"]


def _tradeoff_part(record: Record, figures: dict[str, Figure]) -> str:
    subnets, full, chance = record["subnets"], record["full"], _chance(record)
    traces = _tradeoff_traces(record)
    y = {"title": {"text": "accuracy on test images"}, "tickformat": ".2~%"}
    narrow = {"yaxis.title.text": "accuracy", "xaxis.nticks": 5}
    figures["tradeoff"] = _figure(traces, _over_macs(record, y), narrow)
    reached = ", ".join(f"{s['budget']}: {_percent(_accuracy(s))} with {_count(s['macs'])} MACs" for s in subnets)
    title = f"Accuracy over MACs. Full net: {_percent(full.get('accuracy'), 'unknown')}. {reached}"
    caution = (
        f"With {record['data']['test']:,} test images and one training each, take differences below about "
        f"{_points(chance)} as chance."
    )
    return (
        "<figure><figcaption>Higher and further left is better. The dotted lines mark the MACs of each net; point at a "
        'mark for its figures<span class="mouse">, drag to zoom, double-click to go back</span>. '
        f"{caution if chance else ''}</figcaption>"
        f"{_key('tradeoff', [(trace['name'], trace) for trace in traces])}{_chart('tradeoff', title, 440)}</figure>"
    )


def _tradeoff_traces(record: Record) -> list[Figure]:
    subnets, full = sorted(record["subnets"], key=lambda subnet: float(subnet["macs"])), record["full"]

    def points(kind: str) -> list[_Point]:
        said = "" if _given(record) else f", {kind}"
        return [(s["macs"], s["accuracy"].get(kind), _hover(f"{s['budget']}{said}", s, kind, full)) for s in subnets]

    def lines(colour: str, dash: str) -> Figure:
        return {"mode": "lines+markers", "line": {"color": colour, "width": 2, "dash": dash}}

    uniform = [_uniform_point(subnet, full) for subnet in subnets]
    whole = [(full["macs"], full.get("accuracy"), _hover("full net", {**full, "accuracy": full}, "accuracy", full))]
    traces = [
        _trace("Retrained", points("retrained"), _marker(_RETRAINED, "circle", 12), **lines(_RETRAINED, "solid")),
        _trace("Uniform", uniform, _marker(_UNIFORM, "square-open", 11), **lines(_UNIFORM, "dash")),
        _trace("Found", points("found"), _marker(_FOUND, "diamond", 11)),
        _trace("Full net", whole, _marker(_INK, "star", 15)),
    ]
    if record["path"] and (not _is_loss(record) or all(step.get("accuracy") is not None for step in record["path"])):
        traces.insert(0, _search_trace(record, is_loss=False))  # below the nets
    if _given(record) is not None:
        nets = [trace | {"name": "At its width"} for trace in (traces[0], traces[2])]
        traces = [trace for trace in (*nets, traces[3]) if trace["x"]]
    for trace in traces:
        if not trace["x"]:
            trace["name"] += ": not trained" if trace["name"] in ("Uniform", "Retrained") else ": not measured"
    return traces


def _uniform_point(subnet: Record, full: Record) -> _Point:
    uniform = subnet.get("uniform") or {}
    net = {"macs": uniform.get("macs") or subnet["macs"], "accuracy": subnet["accuracy"]}
    text = _hover(f"{subnet['budget']}, uniform", net, "uniform", full)
    if uniform.get("ratio"):
        text += f"<br>every layer at {uniform['ratio']:.3g} of its width"
    return net["macs"], subnet["accuracy"].get("uniform"), text


def _marker(colour: str, symbol: str, size: int) -> Figure:
    return {"color": colour, "symbol": symbol, "size": size, "line": {"width": 2 if "open" in symbol else 0}}


def _hover(name: str, net: Record, kind: str, full: Record) -> str:
    lines = [
        f"<b>{_label(name)}</b>",
        f"{_percent(net['accuracy'].get(kind))} accuracy",
        f"{_count(net['macs'])} MACs ({_share(net['macs'], full['macs'])})",
    ]
    if "params" in net:
        lines.append(f"{_count(net['params'])} parameters ({_share(net['params'], full['params'])})")
    if net.get("latency_ms") is not None:
        lines.append(f"{_milliseconds(net['latency_ms'])} latency")
    if net.get("latency_predicted_ms") is not None:
        lines.append(f"{_milliseconds(net['latency_predicted_ms'])} predicted")
    return "<br>".join(lines)


def _over_macs(record: Record, y: Figure) -> Figure:
    """A layout over MACs; each net has a dotted line with its name on top, on as many levels as keep names apart."""
    nets = [("full net", record["full"]["macs"]), *((s["budget"], s["macs"]) for s in record["subnets"])]
    least, most = max(1, min(macs for _, macs in nets)), max(macs for _, macs in nets)
    is_log = most > 12 * least
    low, high = (math.log10(least) - 0.15, math.log10(most) + 0.12) if is_log else (0.0, 1.07 * most)
    x: Figure = {"title": {"text": "MACs per image"}, "tickformat": "~s", "range": [low, high]}
    if is_log:
        x |= {"type": "log", "dtick": "D2"}
    annotations: list[Figure] = []
    ends: list[float] = []  # of the last name on each level, in pixels of a narrow screen
    for name, macs in sorted(nets, key=lambda net: net[1]):
        text = _shortened(name, 22)
        place = math.log10(max(macs, 1)) if is_log else macs
        pixels, half = 300 * (place - low) / (high - low), 3.6 * len(text) + 4
        level = next((number for number, end in enumerate(ends) if pixels - half > end), len(ends))
        ends[level : level + 1] = [pixels + half]
        annotation = {"x": place, "y": 1, "yref": "paper", "yanchor": "bottom", "yshift": 17 * level}
        annotations.append(annotation | {"text": _label(text), "showarrow": False, "font": {"size": 12.5}})
    line = {"color": "#b9c0cc", "width": 1, "dash": "dot"}
    guide = {"type": "line", "y0": 0, "y1": 1, "yref": "paper", "layer": "below", "line": line}
    layout = _layout(x, y, annotations=annotations, shapes=[guide | {"x0": macs, "x1": macs} for _, macs in nets])
    layout["margin"]["t"] = 9 + 17 * len(ends)
    return layout


def _search_trace(record: Record, *, is_loss: bool) -> Figure:
    """The greedy walk over MACs: its held-out loss, or its held-out accuracy."""
    sizes = {group["name"]: group for group in record["groups"]}
    current = {name: group["size"] for name, group in sizes.items()}
    word = "held-out loss" if is_loss else "held-out accuracy"
    points = []
    for number, step in enumerate(record["path"], start=1):
        group, change = step["group"], ""
        lower = [choice for choice in sizes.get(group, {}).get("choices", []) if choice < current[group]]
        if lower:
            change = f": {current[group]} → {lower[-1]} channels"
            current[group] = lower[-1]
        score = -step["score"] if is_loss else step.get("accuracy", step["score"])
        shown = f"{score:.4g}" if is_loss else f"{score:.1%}"
        text = f"<b>step {number}</b>, {_label(group)}{change}<br>{_count(step['macs'])} MACs<br>{shown} {word}"
        if "params" in step:
            text += f"<br>{_count(step['params'])} parameters"
        if "latency_predicted_ms" in step:
            text += f"<br>{_milliseconds(step['latency_predicted_ms'])} predicted latency"
        points.append((step["macs"], score, text))
    name = "Loss" if is_loss else "Search path (held-out images)"
    line = {"color": _SEARCH, "width": 2}
    return _trace(name, points, {"color": _SEARCH, "size": 5, "symbol": "circle"}, mode="lines", line=line)


def _search_part(record: Record, figures: dict[str, Figure]) -> str:
    """A section of its own when the search did not look at accuracies, for then it shares no axis with them."""
    if _given(record) is not None:
        return ""
    steps, exchanges = len(record["path"]), _exchanges(record)
    if steps and not _is_loss(record) and not exchanges:
        return ""
    shown = '<p class="none">No step of the search is recorded.</p>'
    if steps and not _is_loss(record):
        shown = "<p>The path is drawn among the accuracies above.</p>"
    elif steps:
        trace = _search_trace(record, is_loss=True) | {"mode": "lines+markers" if steps <= 120 else "lines"}
        layout = _over_macs(record, {"title": {"text": "held-out loss"}, "tickformat": "~g"})
        figures["search"] = _figure([trace], layout, {"xaxis.nticks": 5})
        title = f"Held-out loss over MACs along the {_plural(steps, 'step')} of the greedy search"
        shown = (
            f"<figure><figcaption>{_plural(steps, 'step')}, from the full net at the right to the last budget at the "
            "left; each narrows the one layer whose cut hurts the loss on held-out images the least. Lower is better. "
            f"No net is retrained along the way.</figcaption>{_chart('search', title, 320)}</figure>"
        )
    return (
        '<section id="search" aria-labelledby="search-title"><h2 id="search-title">The search</h2>'
        f"{shown}{exchanges}</section>"
    )


def _exchanges(record: Record) -> str:
    """The channels moved from layer to layer after the greedy pass, as a table; empty if there were none."""
    word, sign = ("loss", -1) if _is_loss(record) else ("accuracy", 1)
    rows = ""
    for subnet in record["subnets"]:
        for move in subnet.get("exchanges", ()):
            narrower = "– (there was room)" if move["narrower"] is None else f"<code>{escape(move['narrower'])}</code>"
            score = f"{sign * move['score']:.4g}" if word == "loss" else f"{move['score']:.1%}"
            rows += (
                f'<tr><th scope="row">{escape(subnet["budget"])}</th><td><code>{escape(move["wider"])}</code></td>'
                f"<td>{narrower}</td><td>{score}</td></tr>"
            )
    if not rows:
        return ""
    return (
        "<h3>Exchanges</h3><p>After the greedy pass, channels were moved from one layer to another as long as that "
        'helped on the held-out images and the budget held.</p><table class="reasons"><thead><tr><th scope="col">Budget'
        '</th><th scope="col">Wider</th><th scope="col">Narrower</th>'
        f'<th scope="col">Held-out {word}</th></tr></thead><tbody>{rows}</tbody></table>'
    )


# --- channels ----------------------------------------------------------------------------------------------------


def _channels_part(record: Record, figures: dict[str, Figure]) -> str:
    rows, columns = len(record["groups"]), len(record["subnets"])
    if not rows or not columns:
        return '<p class="none">No layer was slimmed.</p>'
    figures["channels"] = _channels_figure(record)
    title = (
        f"Channels kept of {_plural(rows, 'layer')} for {_plural(columns, _noun(record))}; the next part lists them too"
    )
    height = (26 if rows <= 20 else 21) * rows + 60
    return (
        "<figure><figcaption>Each row is a layer (with those tied to it, such as both sides of a residual sum), from "
        "input to output; the number is the channels kept. Point at a cell for kept and original.</figcaption>"
        '<p class="scale">none kept <i></i> all kept</p>'
        f"{_chart('channels', title, height, style=f'max-width:{340 + 170 * columns}px')}</figure>"
    )


def _channels_figure(record: Record) -> Figure:
    groups, subnets = record["groups"], record["subnets"]
    rows, columns = list(range(len(groups))), list(range(1, len(subnets) + 1))
    common: Figure = {"type": "heatmap", "y": rows, "xgap": 3, "ygap": 2, "zmin": 0, "zmax": 1, "showscale": False}
    common |= {"hoverinfo": "text", "texttemplate": "%{text}", "textfont": {"size": 12.5, "color": _INK}}
    original = common | {
        "x": [0],
        "z": [[1] for _ in groups],
        "text": [[str(group["size"])] for group in groups],
        "hovertext": [[f"<b>{_label(group['name'])}</b><br>original: {group['size']} channels"] for group in groups],
        "colorscale": [[0, "#f0f1f4"], [1, "#f0f1f4"]],
    }
    kept = common | {
        "x": columns,
        "z": [[subnet["widths"][group["name"]] / group["size"] for subnet in subnets] for group in groups],
        "text": [[str(subnet["widths"][group["name"]]) for subnet in subnets] for group in groups],
        "hovertext": [[_kept(group, subnet) for subnet in subnets] for group in groups],
        "colorscale": _KEPT_SCALE,
    }

    def names(length: int) -> list[str]:
        return [_label(name) + " " for name in _layer_names([group["name"] for group in groups], length)]

    bare: Figure = {"showgrid": False, "showline": False, "fixedrange": True, "tickmode": "array"}
    x = bare | {"side": "top", "tickangle": 0, "tickvals": [0, *columns], "range": [-0.5, len(subnets) + 0.5]}
    y = bare | {"tickvals": rows, "ticktext": names(34), "range": [len(groups) - 0.5, -0.5]}
    x["ticktext"] = ["original", *_column_heads(subnets, 24)]
    layout = _layout(x, y, dragmode=False)
    layout["margin"] |= {"t": 30, "r": 4}
    narrow = {
        "xaxis.ticktext": ["full<br>net", *_column_heads(subnets, 9)],
        "yaxis.ticktext": names(20),
        "font.size": 11.5,
    }
    return _figure([original, kept], layout, narrow)


def _kept(group: Record, subnet: Record) -> str:
    width, size = subnet["widths"][group["name"]], group["size"]
    part = f"{width} / {size} channels ({_share(width, size)})"
    return f"<b>{_label(group['name'])}</b><br>{_label(subnet['budget'])}: {part}"


def _column_heads(subnets: Sequence[Record], length: int) -> list[str]:
    """Budgets above columns; one with a metric takes two lines: memory / <=30%."""
    parts = [re.split("(?=[<=:])", " ".join(subnet["budget"].split()), maxsplit=1) for subnet in subnets]
    return ["<br>".join(_label(_shortened(line, length)) for line in lines if line) for lines in parts]


# --- training ----------------------------------------------------------------------------------------------------


def _training_part(record: Record, figures: dict[str, Figure]) -> str:
    stages = [stage for stage in record["training"] if stage["epochs"]]
    if _given(record):  # the one training of an I-Net, which is no second one
        stages = [{**stage, "stage": stage["stage"].removeprefix("retrained ")} for stage in stages]
    if not stages:
        return '<p class="none">No training is recorded.</p>'
    longest = max(len(stage["epochs"]) for stage in stages)
    epochs: Figure = {"title": {"text": "epoch"}, "nticks": 8}
    if longest <= 10:
        epochs |= {"dtick": 1, "nticks": 0}
    charts = {"loss": ("loss", "training loss", "~g"), "accuracy": ("accuracy", "accuracy on held-out images", ".2~%")}
    if not any(epoch.get("accuracy") is not None for stage in stages for epoch in stage["epochs"]):
        del charts["accuracy"]
    traces: list[Figure] = []
    shown = ""
    for name, (key, title, ticks) in charts.items():
        traces = [_stage_trace(stage, key, record["subnets"]) for stage in stages]
        y = {"title": {"text": title}, "tickformat": ticks}
        figures[name] = _figure(traces, _layout(epochs, y))
        shown += _chart(name, f"{title} over epochs, one line per training", 330)
    seconds = sum(epoch.get("seconds") or 0 for stage in stages for epoch in stage["epochs"])
    spent = f" All together took {_duration(seconds)}." if seconds else ""
    shares = record.get("system") != "i-net"
    widest = " The supernet’s figures are those of its widest net." if shares else ""
    absent = "" if "accuracy" in charts else " Accuracy was not measured during training."
    legend = _key(" ".join(charts), [(stage["stage"], trace) for stage, trace in zip(stages, traces, strict=True)])
    return (
        f"<figure><figcaption>One line per training; click a name to hide its line.{widest}{spent}"
        f'{absent}</figcaption>{legend}<div class="pair">{shown}</div></figure>'
    )


def _stage_trace(stage: Record, key: str, subnets: Sequence[Record]) -> Figure:
    budgets = [subnet["budget"] for subnet in subnets]
    kind, _, budget = stage["stage"].partition(" ") if stage["stage"] not in budgets else ("", "", stage["stage"])
    colour = _BUDGET_COLOURS[budgets.index(budget) % len(_BUDGET_COLOURS)] if budget in budgets else _INK
    points = []
    for epoch in stage["epochs"]:
        value = epoch.get(key)
        if value is not None:
            figure = f"loss {value:.4g}" if key == "loss" else f"{value:.1%} accuracy"
            points.append(
                (epoch["epoch"], value, f"<b>{_label(stage['stage'])}</b><br>epoch {epoch['epoch']}: {figure}")
            )
    few = len(stage["epochs"]) <= 40
    return _trace(
        _label(stage["stage"]),
        points,
        {"color": colour, "size": 5, "symbol": "circle"},
        mode="lines+markers" if few else "lines",
        line={"color": colour, "width": 2, "dash": {"uniform": "dash", "plain": "dot"}.get(kind, "solid")},
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return _plural(round(seconds), "second")
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


# --- tables ------------------------------------------------------------------------------------------------------


def _results_rows(record: Record) -> str:
    full, best, heads = record["full"], _best(record), _heads(record)
    whole = [_percent(full.get("accuracy"), "unknown"), *["–"] * (len(heads) - 1)]
    metrics = _columns(record)
    rows = [_results_row("Full net", full, full, metrics, whole)]
    for subnet in record["subnets"]:
        accuracy, gain = subnet["accuracy"], _gain(subnet)
        uniform = _percent(accuracy.get("uniform")) + _over_seeds(subnet, "uniform")
        if subnet.get("uniform"):
            size = subnet["uniform"]
            uniform += f"<small>{_count(size['macs'])} MACs,<br>widths ×{size['ratio']:.3g}</small>"
        change = "–"
        if gain is not None:
            tone = "none" if _signed(gain) == "±0.0" else "better" if gain > 0 else "worse"
            change = f'<span class="{tone}">{_signed(gain)}</span>'
        cells = {kind: _percent(accuracy.get(kind), "not measured") for kind in ("supernet", "found")}
        retrained = _percent(accuracy.get("retrained")) + _over_seeds(subnet, "retrained")
        cells |= {"retrained": retrained, "uniform": uniform, "gain": change}
        shown = [cells[kind] for kind in heads]
        rows.append(_results_row(escape(subnet["budget"]), subnet, full, metrics, shown, is_best=subnet is best))
    return "".join(rows)


def _columns(record: Record) -> list[str]:
    """The metrics of the table of all figures: peak memory if a budget is on it."""
    peak = ["peak_memory"] if "peak_memory" in record.get("named_metrics", ()) else []
    return ["macs", "params", "memory", *peak, "latency_ms"]


def _over_seeds(subnet: Record, kind: str) -> str:
    """Mean and standard deviation, where a net was retrained by several seeds."""
    found = subnet.get("seeds", {}).get(kind)
    if found is None:
        return ""
    return (
        f"<small>{_percent(found['mean'])} ± {100 * found['std']:.1f}<br>over {len(found['accuracies'])} seeds</small>"
    )


def _results_row(
    name: str, net: Record, full: Record, metrics: Iterable[str], accuracies: Iterable[str], *, is_best: bool = False
) -> str:
    costs = []
    for metric in metrics:
        value = net.get(metric)
        text = _milliseconds(value) if metric == "latency_ms" else _count(value)
        if metric == "latency_ms" and net.get("latency_predicted_ms") is not None:
            text += f"<small>predicted {_milliseconds(net['latency_predicted_ms'])}</small>"
        beside = "" if net is full or value is None else f"<small>{_share(value, full.get(metric))}</small>"
        costs.append(text + beside)
    cells = "".join(f"<td{_muted(cell)}>{cell}</td>" for cell in (*costs, *accuracies))
    tint = ' class="best"' if is_best else ""
    return f'<tr{tint}><th scope="row">{name}</th>{cells}</tr>'


def _muted(cell: str) -> str:
    return ' class="none"' if cell in ("–", "not trained", "not measured", "unknown") else ""


def _frozen_part(record: Record) -> str:
    share = record.get("slimmable_macs")
    text = "" if share is None else f"<p>{share:.1%} of the MACs are in layers whose channels can be cut.</p>"
    if not record["frozen"]:
        return f"{text}<p>Nothing was frozen: every layer of the network could be slimmed.</p>"
    reasons: dict[str, list[str]] = {}
    for note in record["frozen"]:
        reasons.setdefault(note["reason"], []).append(note["name"])
    rows = "".join(
        f'<tr><th scope="row">{escape(why)}</th><td>{_names(names)}</td></tr>' for why, names in reasons.items()
    )
    return (
        f"{text}<p>These layers keep all their output channels in every net:</p>"
        '<table class="reasons"><thead><tr><th scope="col">Why</th><th scope="col">Layers</th></tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )


def _names(names: Sequence[str]) -> str:
    shown = [f"<code>{escape(name)}</code>" for name in names]
    if len(shown) <= _FOLD:
        return ", ".join(shown)
    return f"<details><summary>{len(shown)} layers</summary>{', '.join(shown)}</details>"


def _provenance(record: Record) -> str:
    version, device = record.get("version"), record["device"]
    facts = {
        "Run": record["name"],
        "Model": record["model"],
        "Data": record["data"]["source"],
        "AutoSlim": f"{version}, commit {record['commit']}" if record.get("commit") else version,
        "Date": record.get("date"),
        "Seed": record["seed"],
        "Device": f"{device}, {_plural(record['threads'], 'thread')}" if record.get("threads") else device,
        "Machine": record.get("machine"),
    }
    return "".join(f"<dt>{name}</dt><dd>{escape(str(fact))}</dd>" for name, fact in facts.items() if fact is not None)


# --- the nets, one panel for each --------------------------------------------------------------------------------


def _nets_part(record: Record) -> str:
    subnets, best = record["subnets"], _best(record)
    if not subnets:
        return '<p class="none">No net has been found yet.</p>'
    chosen = next(number for number, subnet in enumerate(subnets) if subnet is best)
    picks = "".join(
        f'<button type="button" class="pick" aria-controls="net-{number}" '
        f'aria-pressed="{"true" if number == chosen else "false"}">{escape(subnet["budget"])}</button>'
        for number, subnet in enumerate(subnets)
    )
    panels = "".join(
        f'<div class="net" id="net-{number}"{"" if number == chosen else " hidden"}>'
        f"{_net_panel(number, subnet, record)}</div>"
        for number, subnet in enumerate(subnets)
    )
    noun = _noun(record).capitalize()
    return f'<div class="buttons" role="group" aria-label="{noun}"><span>{noun}</span>{picks}</div>{panels}'


def _net_panel(number: int, subnet: Record, record: Record) -> str:
    budget, full = escape(subnet["budget"]), record["full"]
    sizes = {group["name"]: group["size"] for group in record["groups"]}
    state = "accuracy" if _given(record) else "retrained" if _is_final(subnet, record) else "not retrained"
    items = (
        f'<li data-group="{escape(name)}"><code>{escape(name)}</code>'
        f'<span class="track" aria-hidden="true"><i style="width:{100 * width / sizes[name]:.0f}%"></i></span>'
        f'<span class="count"><b>{width}</b> / {sizes[name]}</span></li>'
        for name, width in subnet["widths"].items()
    )
    return (
        f"<h3>Widths for {budget}</h3><p>{_count(subnet['macs'])} MACs ({_share(subnet['macs'], full['macs'])} of the "
        f"full net), {_percent(_accuracy(subnet), 'accuracy not measured')} {state}. Channels kept / original, layer "
        f'by layer:</p><div class="bar-row"><button type="button" class="copy" data-net="{number}">Copy widths as JSON'
        '</button><span class="copied" role="status"></span></div>'
        f'<ul class="widths" aria-label="Widths for {budget}">{"".join(items)}</ul>{_usage(subnet)}'
    )


def _usage(subnet: Record) -> str:
    """How to load the net, as far as its files are there."""
    present, directory = subnet["files"], str(subnet["directory"])
    torch = "<p>This net has not been retrained yet, so there is nothing to load.</p>"
    if "model.safetensors" in present:
        torch = _code(
            f"import autoslim\n\nnet = autoslim.load_subnet({_literal(directory)})\n"
            "logits = net(images)  # a plain module, in evaluation mode"
        )
    onnx = ""
    if "model.onnx" in present:
        path = directory.rstrip("/\\") + "/model.onnx"
        code = (
            f"import onnxruntime\n\nsession = onnxruntime.InferenceSession({_literal(path)})\n"
            "name = session.get_inputs()[0].name\nlogits = session.run(None, {name: images})[0]"
        )
        onnx = f"<h3>Run it with ONNX Runtime</h3>{_code(code)}"
    listed = ", ".join(f"<code>{escape(name)}</code>" for name in present) or "none yet"
    return (
        f'<h3>Load it in PyTorch</h3>{torch}{onnx}<p class="note"><code>images</code> is a float32 batch of shape '
        "(N, C, H, W), normalised as in training; a tensor for PyTorch, a NumPy array for ONNX Runtime. Paths are as "
        f"seen from where the run was started. Files in <code>{escape(directory)}</code>: {listed}.</p>"
    )


def _literal(text: str) -> str:
    """The text as a Python string in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _code(text: str) -> str:
    return f'<pre tabindex="0"><code>{escape(text, quote=False)}</code></pre>'
