"""Every shape in configs/models is the published one: it decodes, and it counts the parameters that its first line says."""

import math
import re
import tomllib
from pathlib import Path

import msgspec
import pytest
import torch
from experts_for_tests import fused
from transformers import AutoConfig, AutoModelForCausalLM

from minitune import models

SHAPES = sorted((Path(__file__).parents[1] / "configs" / "models").glob("*.toml"))


def stated(path: Path) -> int:
    """The parameter count in the comment on top of a shape file."""
    first = path.read_text().splitlines()[0]
    found = re.fullmatch(r"# .+: ([\d_]+) parameters", first)
    assert found, f"{path.name}: {first!r}, expected '# NAME: N parameters'"
    return int(found[1])


@pytest.mark.parametrize("path", SHAPES, ids=lambda path: path.stem)
def test_shape_counts_what_was_published(path: Path):
    model = models.open_config(path)
    counted = sum(math.prod(shape) for shape in model.family.shapes(model.config).values())
    assert counted == stated(path)


@pytest.mark.parametrize("path", SHAPES, ids=lambda path: path.stem)
def test_shape_says_what_its_name_says(path: Path):
    """llama-3.2-1b has about 1e9 parameters: published names round, and some leave out the embedding, or two."""
    found = re.search(r"-([\d.]+)([mb])(-a[\d.]+b)?$", path.stem)
    if found is None:
        pytest.skip(f"{path.name} names no size")
    named = float(found[1]) * {"m": 1e6, "b": 1e9}[found[2]]
    assert 0.9 * named < stated(path) < 1.5 * named


@pytest.mark.parametrize("path", SHAPES, ids=lambda path: path.stem)
def test_transformers_builds_the_same_weights_from_a_shape(path: Path):
    model = models.open_config(path)
    config = msgspec.structs.replace(model.config, n_layers=4)  # as many as the longest pattern of layers, but for Gemma 3
    hf = {key: value for key, value in model.family.to_hf(config).items() if key != "architectures"}
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf)).state_dict()
        ours = fused({name: torch.empty(shape) for name, shape in model.family.shapes(config).items()})
    if config.tie_embeddings:
        theirs.pop("lm_head.weight")
    assert {name: w.shape for name, w in ours.items()} == {name: w.shape for name, w in theirs.items()}


def test_every_family_has_a_shape():
    assert {tomllib.loads(path.read_text())["family"] for path in SHAPES} == set(models.FAMILIES)


def test_the_well_known_llamas_are_there():
    named = {path.stem for path in SHAPES}
    assert {
        "llama-2-7b",
        "llama-3-8b",
        "llama-3.1-405b",
        "llama-3.2-1b",
        "llama-3.3-70b",
        "tinyllama-1.1b",
        "smollm2-135m",
    } <= named


@pytest.mark.parametrize("path", [path for path in SHAPES if re.match(r"llama-3\.[123]", path.stem)], ids=lambda path: path.stem)
def test_llama_3_positions_are_scaled(path: Path):
    """The five numbers of transformers' llama3 scaling: 8192 positions were trained on first, and 131072 are reached by it."""
    model = models.open_config(path)
    scaling = model.config.rope_scaling
    factor = 32.0 if "3.2" in path.stem else 8.0
    assert model.config.max_positions == 131072
    assert (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings) == (
        factor,
        1.0,
        4.0,
        8192,
    )
