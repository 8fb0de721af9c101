"""Templates that would take gigabytes or hours are refused before they take them."""

import pytest

from minitune.errors import InputError
from minitune.text.template import compile_template, render

BOMBS = {
    "{{ '%1000000000d' % 1 }}": "a wide field in a pattern of %",
    "{{ '%*d' % (1000000000, 1) }}": "a wide field in a pattern of %",
    "{{ '%1000000000d'|format(1) }}": "a wide field in a pattern of format",
    "{{ '{:>1000000000}'.format(1) }}": "a wide field in a pattern of format",
    "{{ '{:{}}'.format(1, 1000000000) }}": "a wide field in a pattern of format",
    "{{ 'a'|center(1000000000) }}": "a width of more than",
    "{{ 'a'.ljust(1000000000) }}": "a width of more than",
    "{{ 'a\\nb'|indent(1000000000) }}": "a width of more than",
    "{{ [1]|slice(100000000)|list|length }}": "a width of more than",
    "{{ [1, 2]|tojson(indent=1000000000) }}": "a width of more than",
    "{{ 'a' * 1000000000 }}": "more than [0-9]+ characters or items",
    "{{ ([1] * 10000000)|sort|length }}": "more than [0-9]+ characters or items",
    "{{ ([[1] * 5000] * 4000)|sum(start=[])|length }}": "a sum of texts or lists",
    "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}": "more than [0-9]+ characters or items",
    "{{ ('b' * 1000000).join(['a'] * 1000000) }}": "more than [0-9]+ characters or items",
    "{{ (['a' * 1000000] * 1000000)|join }}": "more than [0-9]+ characters or items",
    "{{ ['a' * 1000000] * 1000000 }}": "more than [0-9]+ characters or items",
    "{% set n = namespace(s='a') %}{% for i in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}": "more than [0-9]+ characters",
    "{% set n = namespace(s='a') %}{% for i in range(40) %}{% set n.s = n.s + n.s %}{% endfor %}": "more than [0-9]+ characters",
    "{% set n = namespace(s=[1]) %}{% for i in range(40) %}{% set n.s = n.s + n.s %}{% endfor %}": "more than [0-9]+ characters",
    "{% set x = 'a' * 9000000 %}{% for i in range(90000) %}{% set y = x|upper %}{% endfor %}": "loop steps and calls",
}


@pytest.mark.parametrize("source", BOMBS)
def test_a_template_that_takes_too_much_is_refused(source: str) -> None:
    template = compile_template(source, {}, "bomb")  # compiling computes nothing
    with pytest.raises(InputError, match=f"chat: bomb fails with SecurityError: .*{BOMBS[source]}"):
        render(template, [{"role": "user", "content": "a"}], add_generation_prompt=True)


def test_what_templates_do_in_earnest_stays_as_it_was() -> None:
    source = (
        "{{ '%5d|%s' % (7, 'a') }} {{ '{:>4}'.format(3) }} {{ 1 ~ none ~ missing ~ 'x' }} {{ [1, 2]|tojson(indent=2) }} "
        "{{ ['a', 'b']|join(', ') }} {{ 'a\\nb'|indent(2) }} {{ [1, 2]|sum }} "
        "{{ ['b']|map('upper')|list }} {{ x|default(131072) }}"
    )
    written = render(compile_template(source, {}, "plain"), [], add_generation_prompt=False)
    assert written == "    7|a    3 1Nonex [\n  1,\n  2\n] a, b a\n  b 3 ['B'] 131072"
