"""A figure that offers a choice says everything without its style and its buttons too. What a browser shows: test_book.py."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from helpers import plots

STATES = {"1": ({"left": np.zeros((2, 3)), "right": np.ones((2, 3))}, "holds 43%"),
          "a<b": ({"left": [[0.0, 0.5, 2.0]]}, "holds 75% & more")}


def chooser(name="01-name", **changes) -> plots.Chooser:
    given = {"legend": "rank", "states": STATES, "first": "a<b", "alt": 'Two "corners".'} | changes
    return plots.choose(name, **given)


def bare(html: str) -> str:
    """What a site leaves that strips styles and inputs."""
    return re.sub(r"<style>.*?</style>|<input\b[^>]*>", "", html, flags=re.DOTALL)


def test_each_state_has_its_label_its_pictures_and_its_numbers_also_without_style_and_inputs():
    for html in (chooser().html, bare(chooser().html)):
        states = re.findall(r"<div><b>(.*?)</b>(.*?)<p>([^<]*)</p></div>", html)
        assert [(title, text) for title, _, text in states] == [
            ("rank: 1", "holds 43%"), ("rank: a&lt;b", "holds 75% &amp; more")]
        alts = [re.findall(r'<img alt="([^"]*)"', pictures) for _, pictures, _ in states]
        assert alts == [["rank: 1. left", "rank: 1. right"], ["rank: a&lt;b. left"]]
    assert "<style" not in bare(chooser().html) and "<input" not in bare(chooser().html)


def test_a_picture_has_one_pixel_for_each_number_and_says_how_large_it_is_shown():
    html = chooser(scale=7).html
    pictures = [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"base64,([^\"]+)", html)]
    assert [np.asarray(picture).tolist() for picture in pictures] == [[[0] * 3] * 2, [[255] * 3] * 2, [[0, 128, 255]]]
    assert not any(picture.info for picture in pictures)  # no software, no date
    assert re.findall(r'width="(\d+)" height="(\d+)"', html) == [("21", "14"), ("21", "14"), ("21", "7")]
    colours = chooser(states={"1": ({"rgba": np.zeros((1, 1, 4))}, "")}, first="1").html
    assert Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", colours)[1]))).mode == "RGBA"


def test_the_first_state_is_checked_and_must_be_there():
    assert re.findall(r'id="([^"]*)" checked', chooser().html) == ["choose-01-name-2"]
    with pytest.raises(ValueError, match="01-name: there is no state 'c'"):
        chooser(first="c")


def test_two_figures_share_no_id_no_name_and_no_rule():
    one, other = chooser("01-name").html, chooser("01-names").html
    ids = [re.findall(r'id="([^"]*)"', html) for html in (one, other)]
    assert len({*ids[0], *ids[1]}) == 4 and ids[0] == re.findall(r'for="([^"]*)"', one)
    assert {*re.findall(r' name="([^"]*)"', one)} == {"choose-01-name"}
    rules = re.search(r"<style>(.*?)</style>", one, re.DOTALL)[1].replace("@media screen {", "")
    selectors = [part for rule in re.findall(r"([^{}]+)\{", rules) for part in rule.split(",")]
    assert selectors and all(re.match(r"\.choose-01-name[ >]", part.strip() + " ") for part in selectors)


def test_every_text_is_escaped():
    bad = "<script>\"'&"
    html = chooser(legend=bad, states={bad: ({bad: [[1.0]]}, bad)}, first=bad, alt=bad).html
    assert "<script" not in html and html.count("&lt;script&gt;&quot;&#x27;&amp;") == 10


def test_nbval_and_a_terminal_see_the_alt_text():
    bundle = chooser()._repr_mimebundle_()
    assert bundle == {"text/html": chooser().html, "text/plain": '[figure] Two "corners".'}
    assert 'role="figure" aria-label="Two &quot;corners&quot;."' in bundle["text/html"]
