"""Rules with exceptions that may only become fewer: exceptions.toml lists them, support/ratchets.py counts and lowers them."""

import pytest

from support import ratchets
from support.ratchets import FILE_LINES, FUNCTION_LINES, RULES, Rule, Sources

pytestmark = pytest.mark.fast

PACKAGE = ratchets.package()
LINES = "    x = 1\n"
PLANTED: dict[Rule, list[Sources]] = {  # each with packages that break it
    ratchets.file_is_short: [{"a.py": "x = 1\n" * (FILE_LINES + 1)}],
    ratchets.functions_are_short: [
        {"a.py": "def f():\n" + LINES * FUNCTION_LINES},
        {"a.py": "class A:\n  def f(self):\n" + LINES * FUNCTION_LINES},
        {"a.py": "async def f():\n" + LINES * FUNCTION_LINES},
    ],
    ratchets.conditionals_are_not_nested: [
        {"a.py": "x = 1 if a else 2 if b else 3"},
        {"a.py": "x = 1 if (2 if a else b) else 3"},
        {"a.py": "x = [1 if a else 2 for a in b] if c else []"},
    ],
    ratchets.docstrings_say_what_you_get: [
        {"a.py": '"""The rooms."""'},
        {"a.py": 'class A:\n    """What is there."""'},
        {"a.py": 'def f():\n    """Whether it is."""'},
        {"a.py": 'class A:\n    def _f(self):\n        """How."""'},
    ],
    ratchets.type_names_have_one_meaning: [
        {"a.py": "class Step: ...", "b.py": "class Step: ..."},
        {"a.py": "class Step: ...", "b.py": "Step = tuple[int, int]"},
        {"a.py": "Size = Annotated[int, Meta(ge=0)]", "b.py": "Size = Annotated[int, Meta(gt=0)]"},
    ],
    ratchets.classes_are_abstract_or_final: [
        {"a.py": "class A:\n    def f(self): return 1", "b.py": "class B(A):\n    def f(self): return 2"},
        {"a.py": "class A:\n    def f(self): return 1\nclass B(A): ...\nclass C(B):\n    def f(self): return 2"},
    ],
}
CLEAN = {
    "a.py": '"""Module."""\nclass Base:\n    def f(self) -> int:\n        """Number."""\n        ...\n'
    "    def g(self):\n        raise NotImplementedError\n",
    "b.py": "class Final(Base):\n    def f(self): return 1\n    def g(self): return 2\nx = 1 if a else 2\ny = 3 if b else 4\n"
    f"def longest():\n{LINES * (FUNCTION_LINES - 1)}",
    "models/families/a.py": "class Config: ...",
    "models/families/b.py": "class Config: ...",
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_no_exception_is_added_and_none_is_kept_that_is_not_needed(rule: Rule):
    complaints = ratchets.complaints(rule, ratchets.exceptions()[rule.__name__], PACKAGE)
    help_ = "PYTHONPATH=tests python -m support.ratchets lowers what can be lowered"
    assert not complaints, "\n".join([str(rule.__doc__), *complaints, help_])


@pytest.mark.parametrize(("rule", "sources"), [(rule, one) for rule, planted in PLANTED.items() for one in planted])
def test_a_planted_violation_is_counted(rule: Rule, sources: Sources):
    assert sum(rule(sources).values()) > 0
    assert ratchets.complaints(rule, {}, sources)
    assert not rule(CLEAN)


def test_every_rule_has_a_planted_violation_and_a_table():
    assert set(PLANTED) == set(RULES)
    assert set(ratchets.exceptions()) == {rule.__name__ for rule in RULES}


def test_an_entry_that_is_higher_than_it_need_be_is_found():
    rule = ratchets.conditionals_are_not_nested
    nested = {"a.py": "x = 1 if a else 2 if b else 3"}
    assert not ratchets.complaints(rule, {"a.py": 1}, nested)
    assert ratchets.complaints(rule, {"a.py": 2}, nested)
    assert ratchets.complaints(rule, {"a.py": 1, "gone.py": 1}, nested)


def test_the_table_is_only_lowered():
    nested = {"a.py": "x = 1 if a else 2 if b else 3", "b.py": "x = 1 if a else 2 if b else 3 if c else 4"}
    name = ratchets.conditionals_are_not_nested.__name__
    assert ratchets.lowered({name: {"a.py": 5, "gone.py": 1}}, nested)[name] == {"a.py": 1}
    assert ratchets.lowered({name: {"b.py": 1}}, nested)[name] == {"b.py": 1}
    assert ratchets.lowered({}, nested, accept=True)[name] == {"a.py": 1, "b.py": 2}


def test_the_committed_table_is_as_it_would_be_written():
    assert ratchets.TABLE.read_text("utf-8") == ratchets.written(ratchets.exceptions())
