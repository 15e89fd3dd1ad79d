"""What the page shows of answers and models, as HTML: safe, and no more than was measured."""

import re
from dataclasses import replace

import pytest
from demo_models import make_service

from hf_layerprune import Edit, LayerPlan, Scores
from hf_layerprune.demo import html
from hf_layerprune.demo.comparison import Comparison
from hf_layerprune.demo.generation import Answer

MARK = '<mark title="first difference">{}</mark>'
TEACHER = Answer("one", 50, 0.25, 100.0, 2_000_000, 8_000_000, 6, "float32", "end")
STUDENT = replace(TEACHER, text="two", tokens_per_second=150.0, num_parameters=4_000_000, num_layers=3)


@pytest.fixture(scope="module")
def service(demo_folder):
    return make_service(demo_folder)


@pytest.fixture(scope="module")
def pairing(service):
    return service.catalog["tiny run"]


def headline(pairing, comparison):
    return html.PARTS.headline(pairing.names(3), pairing.description, comparison, pairing.round(3))


def tags(text):
    return set(re.findall(r"<(\w+)", text))


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "![picture](http://elsewhere/x.png)",
        "[link](javascript:alert(1)) <http://elsewhere> [a]\n\n[a]: http://elsewhere",
        '```"><script>alert(1)</script>\ncode\n```',
        '<mark title="</mark><script>">\ue000x\ue001',
    ],
)
def test_an_answer_brings_no_html_of_its_own_and_asks_no_other_host(text):
    assert tags(html.marked(text, None, as_markdown=True)) <= {"p", "br", "pre", "code", "mark"}
    assert tags(html.marked(text, None, as_markdown=False)) == set()
    for as_markdown in (True, False):
        shown = html.marked(text, (0, 3), as_markdown)
        assert "<script" not in shown and "<img" not in shown and "href" not in shown
        assert shown.count("<mark") == shown.count("</mark>") == 1


def test_markdown_and_code_of_a_chat_are_shown_as_such():
    shown = html.marked("**Bold**\n\n```python\nx < 1\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |", None, as_markdown=True)
    assert {"strong", "pre", "code", "table", "td"} <= tags(shown) and "x &lt; 1" in shown


def test_the_word_that_differs_is_marked_also_inside_code_and_bold_type():
    assert MARK.format("man") in html.marked("the old man sat", (8, 11), as_markdown=False)
    assert f"<strong>{MARK.format('b')}</strong>" in html.marked("a **b** c", (4, 5), as_markdown=True)
    assert f"<code>x = {MARK.format('2')}\n" in html.marked("```\nx = 2\n```", (8, 9), as_markdown=True)
    assert "<mark" not in html.marked("ends", (4, 4), as_markdown=True)  # the other one goes on


def test_the_card_of_an_answer_says_where_it_was_cut(pairing):
    cut = replace(STUDENT, ending="length")
    shown = html.cards(pairing, 3, [("Hi", "one", "two")], Comparison(TEACHER, cut))
    assert "3 layers · 4.00M parameters · float32" in shown and "cut at 50 tokens" in shown
    assert "250 ms" in shown and MARK.format("two") in shown and "2 MB" in shown
    waiting = html.cards(pairing, 3, [("Hi", "", "")], Comparison(Answer(num_layers=6), Answer(num_layers=3)))
    assert "3 layers" in waiting and "tokens/s" not in waiting  # what is known stays, what is not is not there
    assert "not run" in html.cards(pairing, 3, [("Hi", "", "")], Comparison(TEACHER, Answer()).stopped())


def test_the_headline_has_both_models_and_the_numbers_that_matter(service, pairing):
    shown = headline(pairing, Comparison(TEACHER, STUDENT))
    assert "teacher" in shown and "tiny run" in shown
    assert "<strong>1.50×</strong> as fast" in shown and "<strong>50%</strong> smaller" in shown
    assert "<strong>0.1</strong> KL divergence" in shown and "nats per token; 0 = identical" in shown
    assert (
        'href="https://huggingface.co/user/name"' in html.PARTS.linked("user/name")
        and html.PARTS.linked("<b>") == "&lt;b&gt;"
    )
    assert "Three &lt;b&gt;rounds&lt;/b&gt;." in shown


def test_slower_is_never_green(pairing):
    for speed, green in ((150.0, True), (100.0, False), (90.0, False)):
        same_size = replace(STUDENT, tokens_per_second=speed, num_parameters=8_000_000)
        assert ("lp-good" in headline(pairing, Comparison(TEACHER, same_size))) == green


def test_the_status_says_what_goes_on(service):
    assert "Getting the models ready" in html.PARTS.status(Comparison())
    assert "writes a token in turn" in html.PARTS.status(Comparison(replace(TEACHER, ending="")))
    assert "1 visitor ahead" in html.PARTS.status(Comparison(waiting="1 visitor ahead, about 10 s"))
    done = html.PARTS.status(Comparison(TEACHER, STUDENT), {"prompt": 'a "b" & c', "depth": 3})
    assert 'href="?prompt=a+%22b%22+%26+c&amp;depth=3"' in done and "part at word 1" in done


def test_the_strip_of_layers_has_all_states_in_use():
    plan = LayerPlan(((0,), (2, 3)), 5)
    shown = html.layer_strip(plan)
    assert re.findall(r'<li class="lp-(\w+)"', shown.split("<ul")[0]) == ["kept", "gone", "parallel", "gone"]
    assert "5 layers of the original became 2" in shown and "merged" not in shown


@pytest.mark.parametrize(
    "edits, criterion, caption",
    [
        (["1", "2"], "kl", "How much predictions change if this layer is removed; log scale"),
        (["1|2", "3|4"], "kl", "How much predictions change if these layers become one; log scale"),
        (["1+2", "3"], "kl", "How much predictions change if this layer is removed (bars), or these layers become one "
         "(lines); log scale"),
        (["1"], "loss", "What it costs if this layer is removed"),
        ([], "kl", "What became of each layer"),
    ],
)  # fmt: skip
def test_the_caption_of_the_layer_map_is_of_the_edits_in_it(pairing, edits, criterion, caption):
    costs = {Edit.from_label(label): 0.1 for label in edits}
    record = replace(pairing.run.rounds[-1], scores=(Scores(criterion, costs),), criterion=criterion)
    assert html.map_label(replace(pairing, run=replace(pairing.run, rounds=(record,)))) == caption
