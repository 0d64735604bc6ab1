"""The page about a run: what it says, that nothing in a record breaks it, and that it works in a browser, offline."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from autoslim import report
from autoslim.errors import ExportError
from autoslim.report import render_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER_OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
HOSTILE = (
    """</script><script>hacked=1</script><img src=x onerror="hacked=1">"""
    """<a href='http://x.example'>&lt;b&amp; %{x} $title"""
)


def _epochs(number: int) -> list[dict[str, Any]]:
    """Curves that do not cover each other."""
    return [
        {"epoch": e, "loss": 1.8 / e + 0.2 * number, "accuracy": 0.8 - 0.3 / e - 0.03 * number, "seconds": 4.2}
        for e in range(1, 9)
    ]


def record(num_groups: int = 14, budgets: tuple[str, ...] = ("50%", "25%"), **changes: Any) -> dict[str, Any]:
    """A run as the pipeline sums it up, with plausible figures."""
    groups = [
        {"name": f"features.{i}.block.{('expand', 'project')[i % 2]}.0.conv", "size": 32 + 16 * i}
        for i in range(num_groups)
    ]
    groups = [{**group, "choices": list(range(8, group["size"] + 1, 8))} for group in groups]
    full = {"macs": 3_433_920, "params": 136_202, "memory": 197_588, "latency_ms": 0.8776, "accuracy": 0.675}
    subnets = []
    for number, budget in enumerate(budgets):
        share = float(budget.split("=")[-1].rstrip("%")) / 100
        subnets.append(
            {
                "budget": budget,
                **{name: int(0.98 * share * full[name]) for name in ("macs", "params", "memory")},
                "latency_ms": 0.6 - 0.01 * number,
                "accuracy": {
                    "supernet": 0.675,
                    "found": 0.655 - 0.02 * number,
                    "retrained": 0.771 - 0.012 * number,
                    "uniform": 0.775 - 0.03 * number,
                },
                "uniform": {"macs": int(share * full["macs"]), "ratio": round(share**0.5, 4)},
                "widths": {g["name"]: g["choices"][(3 * i + number) % len(g["choices"])] for i, g in enumerate(groups)},
                "directory": f"runs/quickstart/subnets/{budget}",
                "files": ["model.safetensors", "model.onnx", "widths.json"],
            }
        )
    path = [
        {
            "group": groups[step % num_groups]["name"],
            "macs": (macs := int(full["macs"] * (1 - 0.02 * (step + 1)))),
            "cost": float(macs),
            "score": -0.86 - 0.003 * step,
        }
        for step in range(36)
    ]
    stages = ["supernet", *(f"{kind} {budget}" for budget in budgets for kind in ("retrained", "uniform"))]
    return {
        "name": "quickstart",
        "model": "autoslim:mobilenet_v1",
        "version": "0.1.0",
        "commit": "abc1234",
        "date": "2026-11-24T10:00:12+01:00",
        "device": "cpu",
        "threads": 2,
        "machine": "Linux x86_64, 2 CPUs",
        "seed": 7,
        "data": {"source": "fashion-mnist-mini", "train": 5000, "holdout": 1000, "test": 1000, "classes": 10},
        "config_yaml": "model: autoslim:mobilenet_v1\nseed: 7\n",
        "metric": "macs",
        "full": full,
        "slimmable_macs": 0.97,
        "groups": groups,
        "subnets": subnets,
        "path": path,
        "score_name": "held-out loss (negated)",
        "training": [{"stage": stage, "epochs": _epochs(number)} for number, stage in enumerate(stages)],
        "frozen": [{"name": "classifier", "reason": "its channels are the output of the network"}],
        **changes,
    }


class Page(HTMLParser):
    """Elements, attributes and visible text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._texts: list[str] = []
        self._inside: str | None = None
        self.feed(html)
        self.close()
        self.text = " ".join("".join(self._texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        self._texts.append(" ")

    def handle_endtag(self, tag: str) -> None:
        self._inside = None
        self._texts.append(" ")

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self._texts.append(data)


def text_of(run: dict[str, Any]) -> str:
    return Page(render_report(run)).text


# --- what it says ------------------------------------------------------------------------------------------------


def test_says_in_words_what_was_slimmed_and_what_came_out() -> None:
    text = text_of(record())
    assert "mobilenet_v1 with 24% of its MACs: 75.9% accuracy" in text
    assert (
        "autoslim:mobilenet_v1 keeps, for 2 budgets. The data is fashion-mnist-mini, 10 classes: 5,000 images" in text
    )
    assert "8.4 points more than the full net inside the supernet (67.5%, not retrained)" in text
    assert "A uniformly narrowed net of equal MACs gets 74.5%" in text
    assert "gained 1.4 points, which may be chance" in text  # 1,000 test images tell no less than 3.7 points
    for fact in ("abc1234", "0.1.0", "Seed 7", "Linux x86_64, 2 CPUs", "seed: 7", "cpu, 2 threads"):
        assert fact in text
    assert 'autoslim.load_subnet("runs/quickstart/subnets/25%")' in text
    assert 'onnxruntime.InferenceSession("runs/quickstart/subnets/25%/model.onnx")' in text


def test_results_table_holds_every_figure() -> None:
    text = text_of(record())
    row = "50% 1.68M 49% 66.7k 49% 96.8k 49% 0.6 ms 68% 67.5% 65.5% 77.1% 77.5% 1.72M MACs, widths ×0.707 −0.4"
    assert "Full net 3.43M 136k 198k 0.878 ms 67.5% – – – –" in text
    assert row in text


def test_peak_memory_has_a_column_if_a_budget_is_on_it() -> None:
    run = record()
    assert "Peak memory" not in text_of(run)
    run["named_metrics"] = ["peak_memory"]
    run["full"]["peak_memory"] = 2_000_000
    for subnet in run["subnets"]:
        subnet["peak_memory"] = 1_000_000
    text = text_of(run)
    assert "Memory elements Peak memory bytes Latency" in text
    assert 'colspan="5">Cost' in render_report(run)  # the heading spans the column that was added
    assert "Full net 3.43M 136k 198k 2M 0.878 ms" in text
    assert "96.8k 49% 1M 50% 0.6 ms" in text


def with_accuracies(*retrained: float | None, uniform: float | None = 0.7, test_images: int = 1000) -> dict[str, Any]:
    run = record(3, tuple(f"{10 * (9 - number)}%" for number in range(len(retrained))))
    for subnet, accuracy in zip(run["subnets"], retrained, strict=True):
        subnet["accuracy"] |= {"retrained": accuracy, "uniform": uniform}
    run["data"]["test"] = test_images
    return run


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (
            with_accuracies(0.70, 0.67, 0.64),
            "mobilenet_v1 with 78% of its MACs: 67.0% accuracy",
        ),  # within a point of 67.5%
        (with_accuracies(0.60, 0.61, 0.59), "mobilenet_v1 with 78% of its MACs: 61.0% accuracy"),  # none is: the best
        (with_accuracies(0.69), "lost 1.0 point, which may be chance."),
        (with_accuracies(0.69), "1.5 points more than the full net inside the supernet (67.5%, not retrained)."),
        (with_accuracies(0.67), "0.5 points less than the full net"),
        (with_accuracies(0.675), "correctly, as many as the full net"),
        (with_accuracies(1.0, uniform=0.8), "gained 20.0 points."),
        (with_accuracies(1.0, uniform=0.9, test_images=20), "gained 10.0 points, which may be chance."),
        (with_accuracies(0.69, test_images=100_000), "lost 1.0 point."),
        (with_accuracies(0.7), "choosing the widths layer by layer made no difference here."),
        (with_accuracies(0.7, uniform=None), "No uniformly narrowed net was trained for comparison."),
        (with_accuracies(None, uniform=None), "of its MACs: 65.5% accuracy before retraining"),
    ],
)
def test_best_trade(run: dict[str, Any], said: str) -> None:
    assert said in text_of(run)


def test_what_is_missing_is_said() -> None:
    run = record(3, ("50%",), frozen=[], path=[], training=[], commit=None)
    run["full"]["latency_ms"] = None
    (subnet,) = run["subnets"]
    subnet |= {"uniform": None, "latency_ms": None, "files": ["widths.json"]}
    subnet["accuracy"] |= {"retrained": None, "uniform": None}
    text = text_of(run)
    assert "not measured 67.5% 65.5% not trained not trained –" in text
    assert "Nothing was frozen" in text
    assert "No step of the search is recorded." in text
    assert "No training is recorded." in text
    assert "This net has not been retrained yet, so there is nothing to load." in text
    assert "onnxruntime" not in text
    assert "commit" not in text
    assert "None" not in text
    assert not re.search(r"\bnan\b", text)


GIVEN = {
    "i-net": "as separate nets (I-Nets); the widths were given, not searched.",
    "s-net": "as one slimmable net (S-Net); the widths were given, not searched.",
    "shared-bn": "as one slimmable net whose widths share BatchNorm; the widths were given, not searched.",
    "us-net": "as one universally slimmable net (US-Net); the widths were given, not searched.",
    "nonuniform-us-net": "as one universally slimmable net of independent widths; the widths were given, not searched.",
}


def given(system: str) -> dict[str, Any]:
    """A run of a system whose widths are given, as the pipeline sums it up."""
    run = record(3, ("100%", "50%", "25%"), system=system, path=[])
    alone = system == "i-net"
    for subnet, name in zip(run["subnets"], ("width 1", "width 0.5", "width 0.25"), strict=True):
        subnet |= {"budget": name, "uniform": None}
        accuracy = {"retrained" if alone else "found": 0.7}
        subnet["accuracy"] = {"supernet": None if alone else 0.705} | dict.fromkeys(("found", "retrained", "uniform"))
        subnet["accuracy"] |= accuracy
    run["full"]["accuracy"] = None if alone else 0.705
    names = [f"retrained {subnet['budget']}" for subnet in run["subnets"]] if alone else ["supernet"]
    return run | {"training": [{"stage": name, "epochs": _epochs(0)} for name in names]}


@pytest.mark.parametrize("system", list(GIVEN))
def test_systems_without_a_search_are_not_said_to_have_searched(system: str) -> None:
    html = render_report(given(system))
    text = Page(html).text
    assert f"autoslim:mobilenet_v1 at 3 widths, {GIVEN[system]}" in text
    assert "held out to watch the training" in text
    said = re.sub(r"<script.*?</script>|<!--.*?-->", "", html, flags=re.S).split('id="provenance"')[0]
    for word in (
        "AutoSlim chose",
        "budget",
        "Budget",
        "retrain",
        "Retrained",
        "Uniform",
        "uniformly",
        "greedy",
        "Found",
    ):
        assert word not in said, word
    assert 'id="search"' not in html
    assert "At its width" in text
    assert "The best trade is the net at width" in text
    assert "autoslim.load_subnet" in text
    if system == "i-net":
        assert "no weights are shared" in text
        assert "upernet" not in said
    else:
        assert "0.5 points less than the widest net (70.5%)" in text


def test_the_nets_of_a_search_may_have_exchanged_bins() -> None:
    run = record(3)
    layers = [group["name"] for group in run["groups"]]
    run["subnets"][1]["exchanges"] = [
        {"wider": layers[2], "narrower": layers[0], "widths": {}, "score": -0.91},
        {"wider": layers[1], "narrower": None, "widths": {}, "score": -0.9},
    ]
    text = text_of(run)
    assert f"Held-out loss 25% {layers[2]} {layers[0]} 0.91 25% {layers[1]} – (there was room) 0.9" in text
    by_accuracy = run | {"score_name": "held-out accuracy"}
    by_accuracy["path"] = [step | {"accuracy": 0.8} for step in run["path"]]
    for subnet in run["subnets"]:
        for move in subnet.get("exchanges", ()):
            move["score"] = 0.812
    text = text_of(by_accuracy)
    assert "The path is drawn among the accuracies above." in text
    assert "Held-out accuracy 25%" in text
    assert "81.2%" in text
    assert "Exchanges" not in text_of(record(3))


def test_training_without_accuracies() -> None:
    run = record()
    for stage in run["training"]:
        stage["epochs"] = [{**epoch, "accuracy": None} for epoch in stage["epochs"]]
    html = render_report(run)
    assert "Accuracy was not measured during training." in html
    assert 'id="chart-loss"' in html
    assert 'id="chart-accuracy"' not in html


def test_who_made_a_run_may_be_unknown() -> None:
    known = record(3)
    html = render_report({key: known[key] for key in known if key not in ("date", "version", "commit", "machine")})
    for name, is_there in (("Date", False), ("AutoSlim", False), ("Machine", False), ("Device", True)):
        assert (f"<dt>{name}</dt>" in html) == is_there
    assert " · </" not in html
    assert "None" not in text_of(known | {"date": "2026-01-01"})[:2000]


def test_run_without_any_net_yet() -> None:
    text = text_of(record(3, ()))
    assert "mobilenet_v1: no net has been found yet" in text
    assert "No net has been found yet." in text


def test_numbers_that_json_does_not_have() -> None:
    run = record(3)
    run["path"][3]["score"] = float("nan")
    run["training"][0]["epochs"][2] = {"epoch": 3, "loss": float("inf"), "accuracy": None, "seconds": 1.0}
    blob = re.search(r'id="page-data">(.*?)</script>', render_report(run), re.S)
    assert blob is not None
    figures = json.loads(blob[1], parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["figures"]
    assert figures["search"]["data"][0]["y"][3] is None
    assert figures["loss"]["data"][0]["y"][2] is None


def test_many_frozen_layers_are_told_by_reason() -> None:
    frozen = [{"name": f"layer.{i}", "reason": "it is shared"} for i in range(40)]
    text = text_of(record(3, frozen=frozen))
    assert "it is shared 40 layers layer.0 , layer.1" in text


# --- nothing in a record breaks it -------------------------------------------------------------------------------


def hostile() -> dict[str, Any]:
    run = record(3, ("50%", HOSTILE[:60] + "=25%"))
    run |= {"name": HOSTILE, "model": HOSTILE, "machine": HOSTILE, "config_yaml": HOSTILE, "device": HOSTILE}
    run["data"]["source"] = HOSTILE
    run["groups"][0]["name"] = HOSTILE
    for subnet in run["subnets"]:
        subnet["widths"] = {HOSTILE: subnet["widths"].pop(record(3)["groups"][0]["name"]), **subnet["widths"]}
        subnet["directory"] = HOSTILE
        subnet["files"].append(HOSTILE)
    run["path"] = [{**step, "group": HOSTILE} for step in run["path"]]
    run["subnets"][0]["exchanges"] = [{"wider": HOSTILE, "narrower": HOSTILE, "widths": {}, "score": -0.9}]
    run["training"].append({**run["training"][0], "stage": HOSTILE})
    run["frozen"] = [{"name": HOSTILE, "reason": HOSTILE}]
    return run


def test_names_are_text_whatever_they_hold() -> None:
    page, harmless = Page(render_report(hostile())), Page(render_report(record(3)))
    for tag in ("script", "img", "b", "a", "style"):
        count = [element for element, _ in harmless.elements].count(tag)
        assert [element for element, _ in page.elements].count(tag) == count, tag
    assert not [attributes for _, attributes in page.elements if any(name.startswith("on") for name in attributes)]
    assert page.text.count(HOSTILE) > 10


def test_loads_nothing_from_anywhere() -> None:
    html = render_report(record())
    page = Page(html)
    loading = [
        (tag, name, value)
        for tag, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "action", "data", "poster") and not (value or "").startswith("#")
    ]
    assert loading == []
    assert "link" not in [tag for tag, _ in page.elements]
    assert not re.search(r"@import|url\(", html[: html.index("</style>")])
    assert "default-src 'none'" in html  # the browser enforces it, plotly.js included
    assert html.count("plotly.js v") == 1


def test_without_plotly_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    assert not report.has_plotly()
    with pytest.raises(ExportError, match=r"pip install 'autoslim\[report\]'"):
        render_report(record())


def test_importing_it_needs_neither_torch_nor_plotly() -> None:
    code = "import autoslim.report, sys; print([m for m in ('torch', 'plotly', 'autoslim.cost') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


# --- in a browser ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=executable, args=list(BROWSER_OPTIONS))
        yield running
        running.close()


class Opened:
    """A page opened from a file, and all that went wrong in it."""

    def __init__(self, browser: Any, path: Path, html: str, width: int, script: str = "") -> None:
        path.write_text(html, encoding="utf-8")
        self.context = browser.new_context(viewport={"width": width, "height": 900}, offline=True)
        self.page = self.context.new_page()
        self.troubles: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.troubles.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.on("dialog", lambda dialog: self.troubles.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))
        if script:
            self.page.add_init_script(script)
        self.url = path.as_uri()
        self.page.goto(self.url)
        self.page.wait_for_function("document.documentElement.dataset.drawn === 'yes'")

    def check(self) -> None:
        """No message on the console, no error, nothing loaded but the page."""
        assert self.troubles == []
        assert [url for url in self.requests if not url.startswith(("data:", "blob:"))] == [self.url]


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """A function that opens the page of a record; at the end every page is checked."""
    pages: list[Opened] = []

    def open_page(run: dict[str, Any], width: int = 1280, script: str = "") -> Any:
        pages.append(Opened(browser, tmp_path / f"report{len(pages)}.html", render_report(run), width, script))
        return pages[-1].page

    yield open_page
    for one in pages:
        one.check()
        one.context.close()


@pytest.fixture(scope="module")
def standard(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The page of the usual record, for tests that only look: opening one takes a second or two."""
    one = Opened(browser, tmp_path_factory.mktemp("standard") / "report.html", render_report(record()), 1280)
    yield one.page
    one.check()
    one.context.close()


def test_charts_are_drawn(standard: Any) -> None:
    page = standard
    assert page.locator("#chart-tradeoff .scatterlayer .trace").count() == 4
    assert page.locator("#chart-tradeoff .point").count() == 2 + 2 + 2 + 1
    assert page.locator("#chart-tradeoff .annotation-text").all_text_contents() == ["25%", "50%", "full net"]
    assert page.locator("#chart-channels .heatmaplayer .hm").count() == 2
    assert page.locator("#chart-channels .heatmap-label").count() == 14 * 3
    assert page.locator("#chart-loss .trace").count() == 5
    assert page.locator("#chart-accuracy .trace").count() == 5
    assert page.locator("#chart-search .point").count() == 36


def test_search_by_accuracy_is_drawn_among_the_nets(opened: Any) -> None:
    run = record(score_name="held-out accuracy")
    run["path"] = [{**step, "score": 0.68 - 0.002 * number} for number, step in enumerate(run["path"])]
    page = opened(run)
    assert page.locator("#chart-tradeoff .scatterlayer .trace").count() == 5
    assert page.locator("#search").count() == 0
    page.get_by_role("button", name="Search path (held-out images)").click()
    assert page.locator("#chart-tradeoff .scatterlayer .trace").count() == 4


def test_a_name_in_the_legend_hides_its_line_in_both_charts(opened: Any) -> None:
    page = opened(record())
    button = page.get_by_role("button", name="uniform 25%")
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    for chart in ("loss", "accuracy"):
        assert page.locator(f"#chart-{chart} .trace").count() == 4
    button.click()
    assert page.locator("#chart-loss .trace").count() == 5


def hover_text(page: Any, target: str, index: int) -> str:
    page.mouse.move(1, 1)  # away from whatever was pointed at before
    page.wait_for_selector(".hoverlayer .hovertext", state="detached")
    element = page.locator(target).nth(index)
    element.scroll_into_view_if_needed()
    box = element.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2 + 1, box["y"] + box["height"] / 2)
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector(".hoverlayer .hovertext")
    return str(" | ".join(page.locator(".hoverlayer .hovertext tspan").all_text_contents()))


@pytest.mark.parametrize(
    ("target", "index", "shown"),
    [
        (
            "#chart-tradeoff .trace:nth-child(1) .point",
            0,
            ("25%, retrained", "75.9% accuracy", "841k MACs (24%)", "33.4k"),
        ),
        (
            "#chart-tradeoff .trace:nth-child(2) .point",
            1,
            ("50%, uniform", "77.5% accuracy", "1.72M MACs (50%)", "0.707"),
        ),
        ("#chart-channels .heatmap-label", 14 + 1, ("features.0.block.expand.0.conv", "25%: 16 / 32 channels (50%)")),
        ("#chart-loss .trace:nth-child(1) .point", 3, ("supernet", "epoch 4: loss 0.45")),
        ("#chart-search .point", 1, ("step 2", "48 → 40 channels", "3.3M MACs", "0.863 held-out loss")),
    ],
)
def test_pointing_at_a_mark_shows_its_figures(standard: Any, target: str, index: int, shown: tuple[str, ...]) -> None:
    text = hover_text(standard, target, index)
    for part in shown:
        assert part in text


def shown_widths(page: Any) -> dict[str, int]:
    items = page.locator(".net:visible li")
    return {
        item.get_attribute("data-group"): int(item.locator("b").inner_text())
        for item in items.all()
        if item.is_visible()
    }


def pasted(page: Any) -> str:
    """What Ctrl+V gives."""
    page.evaluate("document.body.append(Object.assign(document.createElement('textarea'), {id: 'paste'}))")
    page.locator("#paste").focus()
    page.keyboard.press("Control+V")
    return str(page.locator("#paste").input_value())


NO_CLIPBOARD = "Object.defineProperty(navigator, 'clipboard', {value: undefined})"


@pytest.mark.parametrize("script", ["", NO_CLIPBOARD], ids=["clipboard", "no-clipboard-object"])
def test_another_budget_shows_its_widths_and_copies_them(opened: Any, script: str) -> None:
    run = record()
    page = opened(run, script=script)
    half, quarter = run["subnets"]
    assert shown_widths(page) == quarter["widths"]  # the best trade comes first
    page.get_by_role("button", name="50%", exact=True).click()
    assert shown_widths(page) == half["widths"] != quarter["widths"]
    assert 'load_subnet("runs/quickstart/subnets/50%")' in page.locator(".net:visible").inner_text()
    page.locator(".copy:visible").click()
    page.get_by_text("Copied to the clipboard").wait_for()
    text = pasted(page)
    assert json.loads(text) == half["widths"]
    assert list(json.loads(text)) == [group["name"] for group in run["groups"]]


def test_where_copying_is_forbidden_the_text_is_shown(opened: Any) -> None:
    run = record()
    page = opened(run, script=NO_CLIPBOARD + "; Document.prototype.execCommand = () => false")
    page.locator(".copy:visible").click()
    page.get_by_text("The browser does not allow copying").wait_for()
    area = page.get_by_label("Widths as JSON")
    assert json.loads(area.input_value()) == run["subnets"][1]["widths"]


def test_hostile_names_are_shown_as_they_are(opened: Any) -> None:
    run = hostile()
    page = opened(run)
    assert page.evaluate("typeof hacked") == "undefined"
    assert page.locator("svg a").count() == 0
    assert page.locator("#chart-channels img, .chart b").count() == 0
    headline = page.locator("h1").inner_text().replace("\n", " ")  # it shows the last part of a model's name
    assert headline.startswith(HOSTILE.rpartition("/")[2][:20].strip()) or HOSTILE[-20:] in headline
    assert shown_widths(page) == run["subnets"][1]["widths"]
    names = page.locator("#chart-channels .ytick text").all_text_contents()
    assert "&lt;b&amp;" in names[0]  # as it is written in the name, not as HTML
    assert HOSTILE in hover_text(page, "#chart-channels .heatmap-label", 0).replace("\xa0", " ")


OVERLAPS = """() => {
  const found = [];
  for (const chart of document.querySelectorAll(".chart")) {
    const texts = [...chart.querySelectorAll(".xtick text, .ytick text, .annotation-text, .xtitle, .ytitle")];
    const boxes = texts.map(t => [t.textContent, t.getBoundingClientRect()]);
    for (const [text, box] of boxes) {
      const frame = chart.getBoundingClientRect();
      if (box.left < frame.left - 1 || box.right > frame.right + 1) found.push([chart.id, text, "cut off"]);
    }
    boxes.forEach(([text, a], i) => boxes.slice(i + 1).forEach(([other, b]) => {
      const apart = a.right <= b.left + 1 || b.right <= a.left + 1 || a.bottom <= b.top + 2 || b.bottom <= a.top + 2;
      if (!apart) found.push([chart.id, text, other]);
    }));
  }
  return found;
}"""


@pytest.mark.parametrize("width", [1280, 420])
@pytest.mark.parametrize(
    ("num_groups", "budgets"),
    [(3, ("50%",)), (14, ("50%", "25%")), (60, ("75%", "50%", "memory<=30%", "params=12.5%"))],
)
def test_no_label_is_cut_off_or_covered(opened: Any, num_groups: int, budgets: tuple[str, ...], width: int) -> None:
    page = opened(record(num_groups, budgets), width)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    hidden = page.evaluate(
        "document.querySelector('.scroll').scrollWidth - document.querySelector('.scroll').clientWidth"
    )
    assert (hidden > 0) == (width < 600)  # only a narrow screen has to scroll the table, and within its own box
    assert page.evaluate(OVERLAPS) == []
    assert page.locator("#chart-channels .ytick").count() == num_groups


def test_budgets_far_apart_and_close_together(opened: Any) -> None:
    budgets = ("50%", "10%", "9.8%", "2%", "1%")
    page = opened(record(3, budgets), 420)
    labels = page.locator("#chart-tradeoff .annotation-text").all_text_contents()
    assert sorted(labels) == sorted([*budgets, "full net"])
    assert page.evaluate(OVERLAPS) == []
