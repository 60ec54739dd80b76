"""Templates of definitions: what they can say, and that each ends soon and small whatever it says."""

from __future__ import annotations

import time
from typing import Any

import pytest
from jinja2 import TemplateError

from megatron_prune.evaluation.templates import environment

ROW: dict[str, Any] = {
    "a": "text",
    "l": ["x", "y"],
    "choices": {"text": ["ice", "fire"], "label": ["1", "2"]},
    "key": "2",
    "query": "Question: Predators eat\nAnswer:",
    "n": 3,
    "t": True,
    "big": "x" * 100_000,
}
RENDERED = {
    "{{a}}": "text",
    "{{choices.label.index(key)}}": "1",
    "{{choices.text}}": "['ice', 'fire']",
    "{{query[10:-8]}}": "Predators eat",
    "{{t|int}}": "1",
    "{% for x in l %}{{loop.index}}{{x}}{% if not loop.last %}, {% endif %}{% endfor %}": "1x, 2y",
    "{{a ~ '-' ~ n}}": "text-3",
    "{% for i in range(2) %}{{ a.replace('t', 'T') }}{{ '-'.join(l) }}{% endfor %}": "TexTx-yTexTx-y",
    "{{ '12'|int + 'x'|int(7) }} {{ [1, 2]|sum }} {{ 7 // 2 }} {{ 7 - 2 }} {{ 8 / 2 }}": "19 3 3 5 4.0",
    "{{ l|join(', ') }}": "x, y",
    "{{', '.join(l)}}": "x, y",
    "{{a.replace('t','T')}}{{a|replace('t','T')}}": "TexTTexT",
    "{{a|regex_replace('[tx]','_')}}": "_e__",
    "{{ 'a' * 3 }} {{2*3}} {{2**3}} {{7 % 4}} {{1+2}} {{a+'b'}}": "aaa 6 8 3 3 textb",
    "{% set q = a ~ '!' %}{{q}}": "text!",
    "{{ l|map('upper')|list }}": "['X', 'Y']",
    "{{['A','B'][n-2]}}": "B",
    "{{a.strip().split('e')[0]}}": "t",
    "{% for i in range(3) %}{{i}}{% endfor %}": "012",
    "{% for k, v in choices.items() %}{{k}}{% endfor %}": "textlabel",
    "{{ 'yes' if t else 'no' }}": "yes",
    "{% set x = a ~ l[0] ~ (a ~ 'k') %}{{x}}": "textxtextk",
}


@pytest.mark.parametrize("template", RENDERED)
def test_what_questions_need_is_there(template: str) -> None:
    assert environment().from_string(template).render(**ROW) == RENDERED[template]


DOUBLED = ("x ~ x", "x + x", "[x, x]", "(x, x)", "{'a': x, 'b': x}", "x * 2")
BOMBS = [
    *("{{ 'a'*10**10 }}", "{{ 10000000000*'a' }}", "{{ [l]*10**9 }}", "{{ 10**10**10 }}", "{{ 9**9**9**9 }}"),
    "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "{% for a in range(10**9) %}{% endfor %}",
    "{% for a in range(99999) %}{{big}}{% endfor %}",
    *("{{'%1000000000d' % 1}}", "{{'{:1000000000}'.format(1)}}", "{{'{0:9}'.format_map({})}}"),
    *("{{'a'.ljust(10**10)}}", "{{'a'.center(10**9)}}", "{{'1'.zfill(10**9)}}", "{{(1).to_bytes(10**9, 'big')}}"),
    *("{{'a'|center(10**10)}}", "{{a|indent(10**9)}}", "{{5|round(-10**10)}}", "{{lipsum(n=100000)}}"),
    *("{{ l|batch(10**9, 'x')|list }}", "{{ l|slice(10**9)|list }}", "{{ l|map('center', 10**9)|list }}"),
    *("{{big.replace('x', big)}}", "{{big|replace('x', big)}}", "{{big|regex_replace('x', big)}}"),
    *("{{ big.join(big) }}", "{{ big|join(big) }}", "{{ [[[[1]*10000]*10000]*10000] }}", "{{ [big]*100000 }}"),
    *("{% set x='ab' %}" + f"{{% set x = {double} %}}" * 60 + "{{ x }}" for double in DOUBLED),
    "{% set x=10 %}" + "{% set x = x * x %}" * 60 + "{{ x }}",
    "{% for y in [[1, 1]] %}" + "{% for y in [[y, y]] %}" * 18 + "{{ y }}" + "{% endfor %}" * 19,
    "{% set r=range(9999)|list %}{{ [" + "r, " * 9999 + "] }}",
    "{% macro f() %}{{f()}}{{f()}}{% endmacro %}{{f()}}",
    "{% for x in l recursive %}{{loop(l)}}{{loop(l)}}{% endfor %}",
    *("{% include 'x' %}", "{% import 'os' as o %}", "{% extends 'x' %}", "{% block a %}{% endblock %}"),
    "{{ (('f'*10000000)|int(0,16)) // (('f'*5000000)|int(0,16)) }}",
    "{% set b=[3,1,2]*30000 %}{% for i in range(100000) %}{% set x=b|sort %}{% endfor %}",
    "{% set b='x'*3000000 %}{% for i in range(100000) %}{% set x=b.upper() %}{% endfor %}",
    *("{{ ([[1]]*300000)|sum(start=[])|length }}", "{{ ('é'*1000000).encode('punycode') }}", "{{ ('9'*5000000)|int }}"),
    *("{{''.__class__.__mro__}}", "{{ a.encode().hex() }}", "{{ l.append(1) }}", "{{ cycler(1) }}", "{{ loop }}"),
    *("{{" + "(" * 3000 + "1" + ")" * 3000 + "}}", "{{" + "-" * 5000 + "1}}", "a" * 200_000),
]


@pytest.mark.parametrize("number", range(len(BOMBS)))
def test_nothing_goes_on_for_ever_or_grows(number: int) -> None:
    began = time.process_time()
    with pytest.raises((TemplateError, RecursionError)):
        environment().from_string(BOMBS[number]).render(**ROW)
    assert time.process_time() - began < 20


def test_a_regular_expression_ends() -> None:
    template = "{{ ('a' * 4000 ~ '!')|regex_replace('(a|a|aa)+$', '') }}"
    began = time.process_time()
    with pytest.raises(TemplateError, match="not usable"):
        environment().from_string(template).render()
    assert time.process_time() - began < 20


def test_rounds_are_counted_for_each_row_anew() -> None:
    sandbox = environment()
    for _ in range(30):
        rendered = sandbox.from_string("{% for i in range(9000) %}{{ i }}{% endfor %}").render()
    assert rendered.endswith("8999")
