"""What the demo shows: words of strangers as text, the layers, the charts, the heat strip."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from demo_models import make_service

from hf_layerprune import LayerPlan
from hf_layerprune.demo.comparison import AT_ONCE, Snapshot
from hf_layerprune.demo.generation import DONE, FAILED, LOADING, STOPPED, WRITING, Answer
from hf_layerprune.demo.next_tokens import Position
from hf_layerprune.demo.render import notice, render_comparison, render_empty, render_positions, summary_of
from hf_layerprune.demo.render.charts import render_importance, render_quality
from hf_layerprune.demo.render.layers import healed_layers, render_layers
from hf_layerprune.demo.render.text import escaped

REPORT = json.loads((Path(__file__).parent.parent / "recipes/tiny/results/report.json").read_text())
MEASURED = {"state": DONE, "num_tokens": 50, "time_to_first_token": 0.02, "peak_memory_bytes": 2 * 10**7}
ORIGINAL = Answer(text="the old man", tokens_per_second=100.0, num_parameters=7_089_344, num_layers=16, **MEASURED)
COMPRESSED = Answer(text="the old woman", tokens_per_second=150.0, num_parameters=3_938_304, num_layers=8, **MEASURED)
HOSTILE = "<script>alert(1)</script>\x00\u202e<img src=x onerror=alert(1)>${1}{{2}}"


def parsed(html):
    """Well-formed, so that nothing in it can break out of its place."""
    return ElementTree.fromstring(f"<div>{html}</div>".replace(" open>", ">"))


def test_control_characters_can_be_seen_and_writing_stays_as_it_is():
    assert escaped("a\x00\x1b\u202eb\n\t<&\"'>") == "a\u2400\u241b\u2039U+202E\u203ab\n\t&lt;&amp;&quot;&#x27;&gt;"
    assert escaped("नमस्ते \u200d 👩\u200d🔬") == "नमस्ते \u200d 👩\u200d🔬"


def test_words_of_strangers_are_text_everywhere():
    answer = Answer(text=HOSTILE, **MEASURED)
    failed = Answer(state=FAILED, error=HOSTILE)
    shown = [
        render_comparison(Snapshot(answer, answer), HOSTILE),
        render_comparison(Snapshot(answer, failed), HOSTILE, chat=True, history=[(HOSTILE, HOSTILE, HOSTILE)]),
        render_positions([Position(HOSTILE, 0.5, ((HOSTILE, 0.5),), ((HOSTILE, 0.4),))], 4),
    ]
    for html in shown:
        parsed(html)
        assert "<script" not in html and "<img" not in html and "\x00" not in html


def test_answers_show_what_was_measured_and_where_they_part():
    html = render_comparison(Snapshot(ORIGINAL, COMPRESSED), "Look:")
    assert '<mark class="lp-first">man</mark>' in html and '<mark class="lp-first">woman</mark>' in html
    text = " ".join(parsed(html).itertext())
    for value in ("100", "150", "1.50×", "20 ms", "20.0 MB", "7.09M", "3.94M", "memory (est.)"):
        assert value in text
    assert text.count("×") == 1 and html.index("lp-legend") < html.index("lp-pair")
    measured = render_comparison(Snapshot(replace(ORIGINAL, memory_measured=True), COMPRESSED), "Look:")
    assert "peak memory" in measured and "memory (est.)" in measured
    writing = render_comparison(Snapshot(Answer(state=WRITING, text="so far"), Answer()), "Look:")
    assert "<mark" not in writing and "lp-cursor" in writing and "–" in writing


@pytest.mark.parametrize(
    ("snapshot", "told"),
    [
        (Snapshot(ORIGINAL, COMPRESSED), "1.50 times the speed of the original: 150 tokens/s against 100"),
        (Snapshot(ORIGINAL, COMPRESSED), "8 layers instead of 16 and 44% fewer parameters (3.94M)"),
        (Snapshot(ORIGINAL, COMPRESSED), "part after 2 words"),
        (Snapshot(ORIGINAL, COMPRESSED, AT_ONCE), "one after the other is the fair measurement"),
        (Snapshot(ORIGINAL, ORIGINAL), "Both gave the same answer."),
        (Snapshot(Answer(state=LOADING), Answer()), "Loading the original"),
        (Snapshot(ORIGINAL, Answer(state=WRITING)), "The compressed model is writing"),
        (Snapshot(Answer(state=FAILED), COMPRESSED), "The original could not answer; the other one did."),
        (Snapshot(Answer(state=STOPPED), Answer(state=STOPPED)), "Stopped."),
        (Snapshot(Answer(state=DONE), Answer(state=DONE)), "Both gave the same answer."),
    ],
)
def test_the_summary_says_what_was_measured_and_no_more(snapshot, told):
    assert told in summary_of(snapshot)


def test_few_tokens_are_told():
    few = Answer(state=DONE, num_tokens=3, tokens_per_second=10.0)
    assert "few tokens" in summary_of(Snapshot(few, few))


def test_the_layer_map_has_every_layer_with_its_fate_and_its_score():
    rounds = REPORT["rounds"]
    plan = LayerPlan.from_dict(rounds[-1]["plan"])
    root = parsed(render_layers(plan, rounds, REPORT["settings"]))
    told = [block.attrib["data-told"] for block in root.iter("span") if "lp-block" in block.attrib["class"]]
    assert len(told) == plan.num_teacher_layers
    assert sum("removed in round" in text for text in told) == 8
    assert sum("kept and healed" in text for text in told) == 8
    first = rounds[0]
    removed = int(first["edits"][0])
    assert f"Layer {removed}: removed in round 1. Cost {first['scores'][str(removed)]:.4f}" in told[removed]
    assert all("Would cost" in text for text in told if "kept" in text)


def test_pairs_are_one_block_and_without_a_run_there_are_no_scores():
    html = render_layers(LayerPlan(((0,), (1, 2), (4,)), 5), [], {})
    assert "Layers 1 and 2: in parallel" in html and "without a run" in html and "kept as it was" in html
    assert "healed" not in html


def test_healed_are_the_layers_a_run_trained():
    plan = LayerPlan(((0,), (1,), (3,), (4,)), 5).to_dict()
    record = {"plan": plan, "edits": ["2"], "loss_unhealed": 1.0}
    assert healed_layers([record], {"trained_layers": "neighbours"}) == {1, 3}
    assert healed_layers([record], {"trained_layers": "all"}) == {0, 1, 3, 4}
    assert healed_layers([record], {"trained_layers": "0,2"}) == {0}
    assert healed_layers([record], {"trained_layers": "3, 0"}) == {0, 3}
    assert healed_layers([{"plan": plan, "edits": ["2"]}], {"trained_layers": "all"}) == set()


def test_charts_have_a_point_for_every_round_and_a_bar_for_every_edit():
    root = parsed(render_quality(REPORT, 10))
    titles = [title.text for title in root.iter("title")]
    assert len(titles) == 3 * (len(REPORT["rounds"]) + 1)
    assert any(title.startswith("10 layers, healed: perplexity 49.5") for title in titles)
    assert "10 layers: 49.5" in "".join(root.itertext())
    bars = list(parsed(render_importance(REPORT["rounds"])).iter("rect"))
    assert len(bars) == 16 and sum(bar.attrib["class"] == "lp-gone" for bar in bars) == 8
    for figure in (render_quality(REPORT, 10), render_importance(REPORT["rounds"])):
        numbers = [float(value) for value in re.findall(r'(?:x|y|cx|cy|x1|x2|y1|y2)="(-?[\d.]+)"', figure)]
        assert min(numbers) >= 0 and max(numbers) <= 440


def test_charts_of_odd_numbers(tmp_path):
    teacher = REPORT["teacher"]
    for odd in (math.inf, math.nan, "much", None, 0, -1):
        rounds = [record | {"perplexity_unhealed": odd} for record in REPORT["rounds"]]
        parsed(render_quality({"teacher": teacher, "rounds": rounds}, 10))
        lost = [record | {"perplexity": odd, "perplexity_before_healing": odd} for record in rounds]
        parsed(render_quality({"teacher": {**teacher, "perplexity": odd}, "rounds": lost}, 10))
    record = REPORT["rounds"][0] | {"perplexity": teacher["perplexity"], "perplexity_unhealed": 1e6}
    parsed(render_quality({"teacher": teacher, "rounds": [record]}, 15))
    for values in (
        {"1": 0.0, "2": 0.0},
        {"1": -0.1, "2": 0.2},
        {"3": 1e-9, "4": 1e3},
        {"1": None, "2|3": 0.5},
        {"5": 1.0},
    ):
        parsed(render_importance([record | {"scores": values, "all_scores": [{"values": values}]}]))


def test_without_a_run_the_charts_say_so():
    assert "No run" in render_quality(None, 3) and "No run" in render_importance([])


def test_the_heat_strip_opens_one_token_at_a_time():
    positions = [Position(f" {n}", n / 4, ((" a", 0.5),), ((" b", 0.25),)) for n in range(6)]
    positions.insert(2, Position(" worst", 2.0, (), ()))
    html = render_positions(positions, 4)
    assert "after “␣worst” (2.00)" in html and "of 4 layers" in html
    assert re.search(r" open><summary[^>]*>␣worst<", html)
    assert html.count("<details") == 7 and html.count(" open>") == 1
    assert len(set(re.findall(r'name="(lp-\w+)"', html))) == 1
    assert "--heat:1.000" in html and "␣5" in html and "50.0%" in html


def test_before_anything_was_asked(tmp_path):
    service = make_service(tmp_path)
    html = render_empty(service.catalog["tiny run"], 4)
    assert "6 layers" in html and "4 layers" in html and "continues your text" in html
    html = render_empty(service.catalog["tiny chat"], 4, chat=True, told=notice("<b>Too long.", problem=True))
    assert html.count("lp-notice") == 1 and "&lt;b&gt;Too long." in html and "answers your message" in html
