"""The report's page, looked at by a real browser."""

from __future__ import annotations

import asyncio
import io
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from chatterbox_deploy.report import charts, summary
from chatterbox_deploy.report.page import html
from support import browser
from support.situations import card, everything, fleet_file, machine, process, program, seed

SITUATIONS = {
    "two cards": seed(),
    "everything": everything(),
    "eight cards": machine(
        *(card(index, process(100 + index)) for index in range(8)),
        programs=tuple(program(100 + index, "instance") for index in range(8)),
        fleet_file=fleet_file("[gpus]\n" + "".join(f"{index} = {6100 + index}\n" for index in range(8))),
        cores=64,
    ),
    "no card": machine(),
}
SHOTS = Path(os.environ["REPORT_SHOTS"]) if "REPORT_SHOTS" in os.environ else None
"""Where to leave what the browser saw, to be looked at by people."""

SEEN = """(() => ({
    text: document.body.innerText,
    width: document.documentElement.scrollWidth,
    paper: getComputedStyle(document.body).backgroundColor,
    charts: [...document.querySelectorAll("svg")].map(svg => {
        const box = svg.getBoundingClientRect();
        return {x: box.x + scrollX, y: box.y + scrollY, width: box.width, height: box.height};
    }),
    ids: [...document.querySelectorAll("[id]")].map(each => each.id),
}))()"""


@dataclass(frozen=True)
class Sight:
    """What a browser made of a page."""

    complaints: list[str]
    page: dict[str, Any]
    charts: list[bytes]


@pytest.fixture(scope="module")
def sights(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Sight]:
    """Each situation, in light and in dark."""
    if browser.PROGRAM is None:
        pytest.skip("needs chromium")
    folder = SHOTS or tmp_path_factory.mktemp("pages")
    return asyncio.run(_look(folder))


async def _look(folder: Path) -> dict[tuple[str, bool], Sight]:
    found: dict[tuple[str, bool], Sight] = {}
    async with browser.browser() as page:
        for name, situation in SITUATIONS.items():
            path = folder / f"{name.replace(' ', '-')}.html"
            _write(path, html(summary.make(situation)).encode())
            for dark in (False, True):
                page.complaints.clear()
                await page.open(path, width=1280, dark=dark)
                seen = await page.evaluate(SEEN)
                shots = [await page.screenshot(clip=box) for box in seen["charts"]]
                if SHOTS is not None:
                    _write(path.with_suffix(".dark.png" if dark else ".png"), await page.screenshot())
                found[name, dark] = Sight(list(page.complaints), seen, shots)
    return found


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


both = pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
each_one = pytest.mark.parametrize("name", SITUATIONS)


@both
@each_one
def test_it_loads_without_a_complaint_asks_for_nothing_and_fits_the_screen(
    sights: dict[tuple[str, bool], Sight], name: str, dark: bool
) -> None:
    sight = sights[name, dark]

    assert sight.complaints == []
    assert sight.page["width"] <= 1280
    assert len(sight.page["ids"]) == len(set(sight.page["ids"]))


@both
def test_it_says_what_the_report_says(sights: dict[tuple[str, bool], Sight], dark: bool) -> None:
    text = re.sub(r"\s+", " ", sights["two cards", dark].page["text"])

    for words in (
        "18.7 %", "9,190 of 49,152 MiB", "GPU 0 does all the work of 2", "is idle while another computes",
        "9,126 of 24,576 MiB used", "python 48211", "2.00 ×", "0 = 6093 1 = 6094", "sudo chatterbox-deploy apply",
    ):  # fmt: skip
        assert words in text, text


@both
@pytest.mark.parametrize(("name", "count"), [("two cards", 2), ("everything", 4), ("eight cards", 3), ("no card", 0)])
def test_its_charts_show_something(sights: dict[tuple[str, bool], Sight], name: str, count: int, dark: bool) -> None:
    sight = sights[name, dark]

    assert len(sight.charts) == count
    for png in sight.charts:
        pixels = matplotlib.image.imread(io.BytesIO(png))
        ground = pixels[2, 2]
        painted = (abs(pixels - ground).max(axis=2) > 0.05).mean()
        assert painted > 0.005
        # Words are neither black on a dark ground nor white on a light one.
        assert (pixels.max() > 0.6) if dark else (pixels.min() < 0.4)


def test_it_follows_the_readers_light_or_dark(sights: dict[tuple[str, bool], Sight]) -> None:
    light, dark = (sights["two cards", each].page["paper"] for each in (False, True))

    assert light != dark


def test_what_others_wrote_is_text_and_no_html() -> None:
    page = html(summary.make(everything()))

    assert "<script" not in page
    assert "&lt;b&gt;" in page
    assert "&lt;script&gt;" in page


def test_it_needs_nothing_but_itself() -> None:
    page = html(summary.make(everything()))

    assert re.findall(r'(?:src|href)="(?!#|data:,)[^"]*"|url\((?!#)[^)]*\)|@import', page) == []


def test_every_colour_is_one_of_the_readers_light_or_dark() -> None:
    page = html(summary.make(everything()))

    assert not re.search("#0000[0-9a-f]{2}", page)
    named = set(re.findall(r"var\((--[a-z]+)\)", page))
    assert all(page.count(f"{name}: #") == 2 for name in named), named


def test_the_same_report_is_the_same_page() -> None:
    assert html(summary.make(seed())) == html(summary.make(seed()))


def test_without_matplotlib_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with_charts = html(summary.make(seed()))
    monkeypatch.setattr(charts, "available", lambda: False)
    without = html(summary.make(seed()))

    assert "<svg" in with_charts
    assert "<svg" not in without
    assert "in a checkout <code>pip install '.[plots]'</code>" in without
    assert "9,190 of 49,152 MiB" in without
