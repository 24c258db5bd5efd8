"""The demo's report: one file that asks for nothing from outside."""

import html.parser
import re
import xml.etree.ElementTree as ElementTree

import demo_modules
import pytest

pytest.importorskip("matplotlib")
report_page = demo_modules.load_demo_module("report_page")
PANELS = [
    ("Loss", "nats", [("trained", [1, 2, 3], [3.0, 2.0, 1.0]), ("held out", [3], [1.5])]),
    ("Reward", "share", [("sampled", [1, 2], [0.1, 0.9])]),
    ("Correlation", "Pearson", [("of each batch", [1], [0.999])]),
]


class LinkCollector(html.parser.HTMLParser):
    """Collects what a browser would ask for, and scripts."""

    def __init__(self):
        super().__init__()
        self.links, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href", "data", "srcset")]


def make_page(**changes):
    arguments = {
        "summary": ["loss 3.0 -> 1.0"],
        "svg": report_page.draw_curves(PANELS),
        "transcript": [("What is 2 + 3?", "<think>\n5</think>\n\nAnswer: 5")],
        "step_secs": {"convert": 1.25, "train": 2.5},
        "versions": {"Python": "3.11", "jax": "0.10.2"},
    }
    return report_page.make_page(**arguments | changes)


def test_nothing_comes_from_outside():
    page = make_page()
    collector = LinkCollector()
    collector.feed(page)
    assert all(link.startswith(("#", "data:")) for link in collector.links), collector.links
    assert "script" not in collector.tags
    assert not re.search(r"@import|url\((?!#)", page)


def test_curves_are_well_formed_and_named():
    svg = report_page.draw_curves(PANELS)
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg")
    texts = {"".join(node.itertext()).strip() for node in root.iter() if node.tag.endswith("text")}
    assert {"Loss", "Reward", "Correlation", "held out", "step"} <= texts


def test_the_same_curves_are_the_same_bytes():
    assert report_page.draw_curves(PANELS) == report_page.draw_curves(PANELS)


def test_texts_of_the_model_are_escaped():
    page = make_page(transcript=[("<b>?", "</pre><script>alert(1)</script>&")])
    assert "<script>" not in page
    assert "&lt;/pre&gt;&lt;script&gt;" in page


def test_times_and_versions_are_there():
    page = make_page()
    assert all(text in page for text in ("3.8", "0.10.2", "What is 2 + 3?", "loss 3.0 -&gt; 1.0"))
