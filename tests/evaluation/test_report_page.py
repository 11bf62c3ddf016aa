"""The report: every number is results.json's, nothing is fetched, nothing is wider than a phone."""

import base64
import json
import re
import warnings
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
from evaluation.fake_results import METHODS, fake_results
from matplotlib.figure import Figure
from matplotlib.image import imread

from blocktune.evaluation.compare import power_notes
from blocktune.evaluation.report.charts import charts_of
from blocktune.evaluation.report.page import pointer, write_report
from blocktune.evaluation.report.style import COLOURS, DARK, LIGHT, PHONE_INCHES, mark, zoomed
from blocktune.evaluation.report.style import METHODS as LOOKS
from blocktune.files import replace_json
from blocktune.tables import FORMS


def look_up(results, path: str):
    """What lies under a JSON pointer."""
    for part in path.removeprefix("/").split("/"):
        key = part.replace("~1", "/").replace("~0", "~")
        results = results[int(key)] if isinstance(results, list) else results[key]
    return results


class Page(HTMLParser):
    """Collects what a test asks of the page: numbers with their origin, and what it loads."""

    def __init__(self, text: str):
        super().__init__()
        self.numbers, self.loaded, self.styles, self.text = [], [], "", []
        self._open = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self._open = tag
        if tag == "data":
            self.numbers.append([found["data-path"], found["value"], found["data-form"], ""])
        self.loaded += [v for k, v in found.items() if k in ("src", "srcset", "href", "action")]

    def handle_endtag(self, tag):
        self._open = None

    def handle_data(self, data):
        self.text.append(data)
        if self._open == "data":
            self.numbers[-1][3] += data
        if self._open == "style":
            self.styles += data


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    results = json.loads(json.dumps(fake_results()))
    kl = {"kl": 0.25, "top1": 0.9, "tokens": 4, "values": [0.1, 0.4], "entropy": [2.0, 1.0]}
    results["methods"]["naive"]["fidelity"] = kl
    point = {"score": 0.5, "ci95": [0.4, 0.6]}
    bins = [
        {"from": a, "to": a + 0.5, "n": 9, "scores": dict.fromkeys(METHODS, point)}
        for a in (0.0, 0.5)
    ]
    results["sweeps"] = {"place": bins, "context_tokens": bins}
    replace_json(folder / "results.json", results)
    write_report(folder)
    return folder


def read_page(run) -> Page:
    return Page((run / "report.html").read_text(encoding="utf-8"))


def test_every_number_is_the_one_in_results_json(run):
    results = json.loads((run / "results.json").read_text())
    numbers = read_page(run).numbers
    assert len(numbers) > 200
    for path, value, form, text in numbers:
        found = look_up(results, path)
        assert float(value) == found
        assert text == FORMS[form](found)


def test_every_method_and_group_has_its_score_with_interval(run):
    paths = {path for path, *_ in read_page(run).numbers}
    for label, summary in fake_results()["methods"].items():
        assert pointer("methods", label, "score") in paths
        assert pointer("methods", label, "score_ci95", 1) in paths
        for group in summary["tasks"]:
            assert pointer("methods", label, "tasks", group, "score") in paths
        assert pointer("methods", label, "adjusted_f1_bias") in paths
    assert pointer("methods", "naive", "score_minus", "full-prefill", "p_holm") in paths
    assert pointer("methods", "naive", "fidelity", "kl") in paths


def test_nothing_is_fetched(run):
    page = read_page(run)
    assert page.loaded
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.loaded)
    text = (run / "report.html").read_text()
    assert "@import" not in text
    assert "url(" not in page.styles
    assert "<script" not in text


def test_only_tables_scroll_sideways_and_words_stay_whole(run):
    text, page = (run / "report.html").read_text(), read_page(run)
    assert 'name="viewport" content="width=device-width' in text
    assert re.search(r"img \{[^}]*width: 100%", page.styles)
    assert re.search(r"\.scroll \{[^}]*overflow-x: auto", page.styles)
    assert re.search(r"th, td \{[^}]*white-space: nowrap", page.styles)
    assert text.count("<table") == text.count('<div class="scroll"') > 5
    assert re.search(r"@media print \{.*\.scroll \{ overflow: visible", page.styles)
    assert not re.search(r"(?<!pre-wrap; )overflow-wrap: anywhere", page.styles)
    widths = [float(w) for w in re.findall(r"min-width:\s*([\d.]+)(?:px|rem)", page.styles)]
    assert not widths
    assert PHONE_INCHES * 72 < 390


def test_one_table_compares_the_methods_on_everything(run):
    [first, *_] = re.findall(r"<table>.*?</table>", (run / "report.html").read_text(), re.DOTALL)
    paths = {path for path, *_ in Page(first).numbers}
    for label, summary in fake_results()["methods"].items():
        assert {
            pointer("methods", label, "tasks", kind, "score") for kind in summary["tasks"]
        } <= paths
        assert pointer("methods", label, "recompute_ratio") in paths


def test_the_page_names_its_model_and_shows_each_score_once(tmp_path):
    results = json.loads(json.dumps(fake_results()))
    for summary in results["methods"].values():
        for cell in summary["tasks"].values():
            cell["scores"] = {"substring_em": cell["substring_em"], "qa_f1": 0.25}
    replace_json(tmp_path / "results.json", results)
    write_report(tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert f"model: {results['provenance']['model']}" in text
    assert "qa_f1</bdi>" in text
    assert "substring_em</bdi>" not in text
    assert "within chance. n:" in text


def test_published_methods_that_choose_by_the_question_share_a_colour():
    assert len({LOOKS[name][0] for name in ("prophetkv", "a3", "query-attention")}) == 1
    assert mark(LIGHT, "prophetkv")["color"] != mark(LIGHT, "cacheblend")["color"]


def test_each_method_has_one_look_of_its_own():
    assert len(set(LOOKS.values())) == len(LOOKS)
    assert {colour for colour, _ in LOOKS.values()} == set(COLOURS)
    for ground in (LIGHT, DARK):
        looks = {tuple(mark(ground, name).values()) for name in LOOKS}
        assert len(looks) == len(LOOKS)
        assert len(ground.series) == len(COLOURS)


def test_a_variant_has_the_look_of_its_method_but_hollow():
    own, variant = mark(LIGHT, "cacheblend"), mark(LIGHT, "cacheblend 30 %")
    assert own["markerfacecolor"] == own["color"]
    assert variant == own | {"markerfacecolor": LIGHT.paper}
    for label in ("kvlink-2", "kvlink + epic", "kvlink:num_links=3"):
        assert mark(LIGHT, label)["color"] == mark(LIGHT, "kvlink")["color"]
    assert (
        mark(LIGHT, "block-distill + deviation")["marker"] == mark(LIGHT, "block-distill")["marker"]
    )
    assert mark(LIGHT, "my-method") == mark(LIGHT, "my-method") != mark(LIGHT, "other-method")


def test_an_axis_shows_where_the_scores_are():
    assert zoomed([0.97, 0.62]) == (0.6, 1.0)
    assert zoomed([0.6, 0.9]) == (0.5, 1.0)  # an interval does not end on the axis
    assert zoomed([0.15, 0.46]) == (0.0, 0.5)
    assert zoomed([0.35, 0.4]) == (0.3, 0.5)
    assert zoomed([0.15, 1.0]) == zoomed([0.0, 0.85]) == zoomed([]) == (0.0, 1.0)


def test_no_context_does_not_squeeze_the_other_methods():
    axes = Figure().add_subplot()
    next(iter(charts_of(fake_results()))).fill(axes, LIGHT)
    start = axes.get_ylim()[0]
    assert start > 0.3
    assert "axis from" in axes.get_ylabel()
    assert any(re.fullmatch(r"no-context \(\d+ %\)", text.get_text()) for text in axes.texts)
    assert [line.get_marker() for line in axes.lines if start in line.get_ydata()] == ["v"]


def test_pictures_come_light_and_dark_and_are_sound(run):
    page = read_page(run)
    results = json.loads((run / "results.json").read_text())
    assert len(page.loaded) == 2 * len(charts_of(results))
    for source in page.loaded:
        svg = base64.b64decode(source.partition(",")[2])
        assert ET.fromstring(svg).tag.endswith("svg")
    assert len(set(page.loaded)) == len(page.loaded)


def test_pngs_lie_beside_the_page(run):
    results = json.loads((run / "results.json").read_text())
    names = {path.stem for path in (run / "report").glob("*.png")}
    assert names == {chart.name for chart in charts_of(results)}
    picture = imread(run / "report" / "score-by-ttft_s.png")
    assert min(picture.shape[:2]) > 500


def test_a_report_is_the_same_file_every_time(run):
    first = (run / "report.html").read_bytes()
    write_report(run)
    assert (run / "report.html").read_bytes() == first


def test_labels_cannot_break_the_page(tmp_path):
    results = json.loads(json.dumps(fake_results()))
    odd = "<b>k & 'v'</b>" + "x" * 200
    results["methods"] = {odd if k == "kvlink" else k: v for k, v in results["methods"].items()}
    for summary in results["methods"].values():
        if "kvlink" in (minus := summary["score_minus"]):
            minus[odd] = minus.pop("kvlink")
    results["budget"]["pareto"] = {k: [] for k in results["budget"]["pareto"]}
    results["budget"]["matched"] = []
    replace_json(tmp_path / "results.json", results)
    with warnings.catch_warnings(action="error"):  # matplotlib warns if charts have no room
        text = write_report(tmp_path).read_text()
    assert "<b>k" not in text
    assert re.search(r"th bdi \{[^}]*max-width: ", text)  # numbers stay beside the fixed column
    assert odd in "".join(Page(text).text)


def test_groups_of_like_names_have_pictures_of_their_own():
    results = json.loads(json.dumps(fake_results()))
    groups = ["a/b", "a-b", "A-B", "k" * 300, "k" * 301]
    for summary in results["methods"].values():
        summary["tasks"] = dict.fromkeys(groups, summary["tasks"]["2-hop"])
    names = [chart.name for chart in charts_of(results)]
    assert "task-a-b" in names
    assert len({name.lower() for name in names}) == len(names)  # not all file systems tell case
    assert max(map(len, names)) < 60


def test_too_few_questions_are_said_to_be_too_few():
    results = json.loads(json.dumps(fake_results()))
    minus = results["methods"]["kvlink"]["score_minus"]["full-prefill"]
    minus |= {"mean": -0.0125, "p_holm": 0.4, "n_needed": 1200}
    [note, *_] = power_notes(results)
    assert note.startswith("400 questions cannot tell these methods from full-prefill: ")
    assert "kvlink (-1.2 points; 1,200 would be enough)" in note


@pytest.mark.parametrize("key", ["score_minus", "tasks", "score_ci95"])
def test_results_of_another_version_are_refused_in_one_line(tmp_path, key):
    results = json.loads(json.dumps(fake_results()))
    del results["methods"]["naive"][key]
    replace_json(tmp_path / "results.json", results)
    with pytest.raises(ValueError, match=rf"results\.json: edited, or of another .*'{key}'"):
        write_report(tmp_path)
