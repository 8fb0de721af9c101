"""Shape files: every mistake in one is named with its line and with what was expected."""

from pathlib import Path

import pytest

from minitune import models
from minitune.errors import InputError
from support.paths import ROOT

SHAPE = (ROOT / "configs/models/demo.toml").read_text(encoding="utf-8")  # family stands in line 2, n_layers in line 3


@pytest.mark.fast
@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('family = "llama"', 'family = "lama"', r":2: family is 'lama', expected one of llama, .*; did you mean 'llama'\?"),
        ('family = "llama"\n', "", r"shape\.toml: family is None, expected one of llama, mistral, "),
        ('family = "llama"', "family = [1]", r":2: family is \[1\], expected one of llama, mistral, "),
        ("n_layers =", "n_layer =", r":3: n_layer is unknown, expected one of .*; did you mean 'n_layers'\?"),
        ("n_layers = 4", 'n_layers = "4"', r':3: n_layers is "4", expected int'),
        ("n_layers = 4\n", "", r"shape\.toml: n_layers is missing, expected int; add it"),
        ("n_layers = 4", "n_layers = = 4", r":3: column 12: .*, expected TOML"),
    ],
)
def test_a_mistake_in_a_shape_is_named_with_its_line(before: str, after: str, message: str, tmp_path: Path) -> None:
    assert before in SHAPE
    (tmp_path / "shape.toml").write_text(SHAPE.replace(before, after), encoding="utf-8")
    with pytest.raises(
        InputError, match=rf"^models: .*shape\.toml.*{message}" if message[0] == ":" else rf"^models: .*{message}"
    ):
        models.open_config(tmp_path / "shape.toml")


@pytest.mark.fast
def test_a_shape_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"models: .*none\.toml does not exist, expected a model shape such as configs/models/"):
        models.open_config(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes(b"# \xe9\n")
    with pytest.raises(InputError, match=r"models: .*latin\.toml can't be read \(.*\), expected a TOML file in UTF-8"):
        models.open_config(tmp_path / "latin.toml")
