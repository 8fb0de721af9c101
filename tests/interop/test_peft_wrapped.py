"""Adapters of the text model within a model that also sees images, both ways, against PEFT on the whole of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForImageTextToText

from minitune import checkpoint, models, tree
from minitune.algorithms.objective import apply_trainable
from minitune.errors import InputError
from minitune.interop.peft.layout import Base
from minitune.interop.peft.load import load_adapter
from minitune.interop.peft.save import save_adapter
from minitune.lora import Lora, check_deltas
from support.closeness import distance
from support.experts import small_experts
from support.families import IMAGES, VISION
from support.models import family_of, model_of, random_batch

ATOL = 1e-5  # of the largest logit
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
LLAMA4: dict[str, Any] = {"boi_token_index": 1, "eoi_token_index": 2, "image_token_index": 3}
WITH_IMAGES = {**IMAGES, "llama4": (small_experts("llama4_text"), LLAMA4)}
STACKED = ["experts.gate_up_proj", "experts.down_proj", "router.weight"]


@pytest.fixture(params=WITH_IMAGES)
def whole(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Any]:
    """The kind of a model that sees images, and such a model, which tmp_path/whole holds too."""
    config, fields = WITH_IMAGES[request.param]
    text = {key: value for key, value in family_of(config).to_hf(config).items() if key != "architectures"}
    text |= {"pad_token_id": None, "bos_token_id": 4, "eos_token_id": 5}
    tied = {"tie_word_embeddings": config.tie_embeddings}
    numbers = AutoConfig.for_model(request.param, text_config=text, vision_config=VISION, **fields, **tied)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(numbers).eval()
    with torch.no_grad():
        for x in model.parameters():
            x.copy_(0.3 * torch.randn(x.shape))
    model.save_pretrained(tmp_path / "whole")
    return request.param, model


def text_logits(hf: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Of Llama 4's language model, because the whole asks it for the images that it had in transformers 5.24."""
    return (hf.language_model if type(hf).__name__.startswith("Llama4") else hf).eval()(tokens).logits


def test_an_adapter_of_the_text_within_goes_both_ways(whole: tuple[str, Any], tmp_path: Path) -> None:
    name, hf = whole
    model = models.open(tmp_path / "whole")
    assert model == model_of(WITH_IMAGES[name][0])
    params, tokens = checkpoint.load_params(tmp_path / "whole", model.shapes()), 6 + random_batch(model.config, 2, 9).tokens % 11
    targets = ("*.self_attn.*_proj.weight", *(["*.experts.*_proj", "*.router.weight"] if name == "llama4" else ["*.mlp.*"]))
    rule = Lora(2, 3.0, targets, {"*.layers.0.*": 3}, rslora=True)
    generator = torch.Generator().manual_seed(0)
    deltas = tree.map(lambda x: x + 0.2 * torch.randn(x.shape, generator=generator), rule.init(params, 0))
    trainable = {**deltas, "model.norm.weight": params["model.norm.weight"] + 0.5}
    save = {"base": Base("x"), "names": params}
    save_adapter(tmp_path / "ours", trainable, rule, **save, wrapper=name)
    logits = model.forward(apply_trainable(params, trainable, rule), tokens)
    with torch.no_grad():
        PeftModel.from_pretrained(hf, tmp_path / "ours")
        theirs = text_logits(hf, tokens)
    assert distance(logits, theirs) <= ATOL
    again, back, _ = load_adapter(tmp_path / "ours", names=params)
    assert all(
        torch.equal(x, y) for x, y in zip(tree.leaves({n: back[n] for n in trainable}), tree.leaves(trainable), strict=True)
    )
    assert again.scale(next(iter(deltas.values()))) == pytest.approx(rule.scale(next(iter(deltas.values()))))


def test_an_adapter_that_peft_made_of_the_whole_is_read(whole: tuple[str, Any], tmp_path: Path) -> None:
    name, hf = whole
    model = models.open(tmp_path / "whole")
    params, tokens = checkpoint.load_params(tmp_path / "whole", model.shapes()), 6 + random_batch(model.config, 2, 9).tokens % 11
    modules = r".*language_model.*\.(q_proj|o_proj)"  # the vision tower has such names too
    fields: dict[str, Any] = {"target_parameters": STACKED} if name == "llama4" else {}
    fields |= {"rank_pattern": {r".*\.0\.self_attn\.o_proj": 3}, "alpha_pattern": {"language_model.*q_proj": 11}}
    theirs = get_peft_model(hf, LoraConfig(r=2, lora_alpha=5, target_modules=modules, init_lora_weights=False, **fields))
    with torch.no_grad():
        wanted = text_logits(hf, tokens)
    theirs.save_pretrained(tmp_path / "theirs")
    rule, deltas, _ = load_adapter(tmp_path / "theirs", names=params)
    check_deltas(params, deltas, "here")
    assert distance(model.forward(rule.apply(params, deltas), tokens), wanted) <= ATOL
    assert distance(model.forward(params, tokens), wanted) > 100 * ATOL
    if name == "gemma3":
        get_peft_model(theirs.unload(), LoraConfig(target_modules=r".*vision_tower.*q_proj")).save_pretrained(tmp_path / "images")
        with pytest.raises(InputError, match=r"adapts '.*vision_tower\..*', a part that sees images, expected deltas of"):
            load_adapter(tmp_path / "images", names=params)
