"""Decoding: what is drawn and how often, what a row depends on, where an answer ends, and what is printed of it meanwhile."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice, pairwise
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process as theirs

from minitune import models
from minitune.autodiff.remat import remat
from minitune.inference import generate as inference_generate
from minitune.inference import sampling
from minitune.inference.generate import answers, generate, greedy, stream
from minitune.inference.sampling import Sampling, filtered, next_tokens
from minitune.inference.stop_strings import pieces
from minitune.io import paths
from minitune.lora import Lora
from minitune.models import Model, decoder
from minitune.models.families import llama
from minitune.models.rope_scaling import LongRope
from minitune.quant.rules import Quantization
from minitune.quant.schemes import Int4, dequantize, packed
from minitune.quant.tensors import PackedInt4, QInt8
from minitune.text import tokenizer
from minitune.text.chat import encode_prompt, open_template
from minitune.types import Delta
from support.models import SMALL, configs, random_params, reference
from support.scripts import run_script

MODEL = Model(llama.FAMILY, SMALL)
DRAWN = Sampling(temperature=1.5, top_k=11, top_p=0.9, min_p=0.02, repetition_penalty=1.3)


@st.composite
def rules(draw: st.DrawFn) -> Sampling:
    return Sampling(
        temperature=draw(st.sampled_from([0.3, 1.0, 2.5])),
        top_k=draw(st.none() | st.integers(1, 40)),
        top_p=draw(st.none() | st.sampled_from([0.01, 0.5, 0.9, 1.0])),
        min_p=draw(st.none() | st.sampled_from([0.0, 0.05, 0.4, 1.0])),
        repetition_penalty=draw(st.sampled_from([0.6, 1.0, 1.8])),
    )


def processors(rule: Sampling) -> LogitsProcessorList:
    """What transformers' generate applies for these settings, in its order."""
    chain: list[Any] = []
    if rule.repetition_penalty != 1.0:
        chain.append(theirs.RepetitionPenaltyLogitsProcessor(rule.repetition_penalty))
    chain.append(theirs.TemperatureLogitsWarper(rule.temperature))
    if rule.top_k is not None:
        chain.append(theirs.TopKLogitsWarper(rule.top_k))
    if rule.top_p is not None:
        chain.append(theirs.TopPLogitsWarper(rule.top_p))
    if rule.min_p is not None:
        chain.append(theirs.MinPLogitsWarper(rule.min_p))
    return LogitsProcessorList(chain)


def prompts_of(lengths: Sequence[int], seed: int, vocab_size: int = SMALL.vocab_size) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in lengths]


@given(rule=rules(), seed=st.integers(0, 2**32), n_rows=st.integers(1, 4), size=st.sampled_from([1, 2, 17, 31]))
def test_the_filters_are_those_of_transformers(rule: Sampling, seed: int, n_rows: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n_rows, size, generator=generator)
    said = torch.randint(0, size, (n_rows, 5), generator=generator)
    ids: Any = said
    torch.testing.assert_close(filtered(logits, said, rule), processors(rule)(ids, logits.clone()))
    assert torch.isfinite(filtered(logits, said, rule)).any(1).all()


@pytest.mark.parametrize("rule", [Sampling(temperature=1.0), Sampling(temperature=0.7, top_k=5), DRAWN])
def test_tokens_are_drawn_as_often_as_the_filtered_distribution_says(rule: Sampling) -> None:
    n = 20_000
    logits = 1.5 * torch.randn(1, 13, generator=torch.Generator().manual_seed(3))
    said = torch.tensor([[2, 2, 5]])
    probs = filtered(logits, said, rule).double().softmax(1)[0]
    drawn = next_tokens(logits.expand(n, -1), said.expand(n, -1), rule, range(n), 4)
    counts = torch.bincount(drawn, minlength=13).double()
    assert not counts[probs == 0].any()
    live = probs > 0
    chi_square = float(((counts - n * probs).square() / (n * probs))[live].sum())
    assert chi_square < 3 * int(live.sum())  # its mean is the number of live tokens less one; the seeds are fixed
    steps = torch.stack([next_tokens(logits, said, rule, [7], step) for step in range(300)])
    assert steps.unique().numel() > 2


@given(seed=st.integers(0, 2**32), step=st.integers(0, 5), order=st.permutations(range(5)), kept=st.integers(1, 5))
def test_a_draw_depends_on_its_row_alone(seed: int, step: int, order: list[int], kept: int) -> None:
    logits = torch.randn(5, 17, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    said, some = torch.arange(10).view(5, 2), order[:kept]
    whole = next_tokens(logits, said, DRAWN, [seed + i for i in range(5)], step)
    assert torch.equal(next_tokens(logits[some], said[some], DRAWN, [seed + i for i in some], step), whole[some])


def test_a_token_of_probability_zero_is_never_drawn_at_the_borders(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    for u, token in ((0.0, 1), (0.5, 3), (1 - 2**-53, 3)):
        monkeypatch.setattr(sampling.torch, "rand", lambda *_, u=u, **__: torch.tensor(u, dtype=torch.float64))
        assert next_tokens(logits, torch.tensor([[0]]), Sampling(temperature=1.0), [0], 0).tolist() == [token]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"top_k": 3}, "top_k is 3 at temperature 0, .* expected a temperature above 0"),
        ({"temperature": float("nan")}, "temperature is nan, expected"),
        ({"temperature": 1.0, "min_p": float("inf")}, "min_p is inf, expected"),
    ],
)
def test_sampling_refuses(knobs: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**knobs)  # pyright: ignore[reportArgumentType]


@settings(max_examples=8)
@given(config=configs(scaling="default"), seed=st.integers(0, 2**32), lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_greedy_equals_transformers_on_a_left_padded_batch(config: llama.Config, seed: int, lengths: list[int]) -> None:
    params, prompts, n_new = random_params(config, seed, torch.float64), prompts_of(lengths, seed, config.vocab_size), 7
    free = greedy(Model(llama.FAMILY, config), params, prompts, max_new_tokens=n_new, stop_ids=[])
    stop = free[0][n_new // 2]
    answers = greedy(Model(llama.FAMILY, config), params, prompts, max_new_tokens=n_new, stop_ids=[stop])
    width = max(lengths)
    tokens = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    real = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    options: dict[str, Any] = {"max_new_tokens": n_new, "do_sample": False, "eos_token_id": stop, "pad_token_id": stop}
    hf: Any = reference(config, params)
    expected = hf.generate(tokens, attention_mask=real, **options)[:, width:].tolist()
    assert answers == [row[: row.index(stop)] if stop in row else row for row in expected]
    assert stop in expected[0]


@settings(max_examples=8)
@given(seed=st.integers(0, 2**32), penalty=st.sampled_from([0.5, 1.7]))
def test_the_repetition_penalty_equals_transformers_and_counts_no_padding(seed: int, penalty: float) -> None:
    params, prompts = random_params(SMALL, seed, torch.float64), prompts_of([2, 7], seed)
    rule = Sampling(repetition_penalty=penalty)
    answers = generate(MODEL, params, prompts, sampling=rule, seed=0, max_new_tokens=9, stop_ids=[])
    hf: Any = reference(SMALL, params)
    for prompt, row in zip(prompts, answers, strict=True):
        options: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        tokens = torch.tensor([prompt])
        expected = hf.generate(tokens, attention_mask=torch.ones_like(tokens), repetition_penalty=penalty, **options)
        assert row == expected[0, len(prompt) :].tolist()


@settings(max_examples=8)
@given(config=configs(scaling="default"), seed=st.integers(0, 2**32), stride=st.integers(1, 9))
def test_the_cache_equals_the_full_forward_wherever_its_strides_end(config: llama.Config, seed: int, stride: int) -> None:
    params, prompts = random_params(config, seed, torch.float64), prompts_of([3, 1, 6], seed, config.vocab_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference_generate, "STRIDE", stride)
        options: Any = {"sampling": DRAWN, "row_seeds": [5, 6, 7], "max_new_tokens": 8}
        answers = torch.stack(list(stream(Model(llama.FAMILY, config), params, prompts, **options))).T.tolist()
    for row_seed, prompt, row in zip((5, 6, 7), prompts, answers, strict=True):
        tokens = torch.tensor([prompt])
        for step in range(8):
            logits = Model(llama.FAMILY, config).forward(params, tokens)[:, -1]
            tokens = torch.cat([tokens, next_tokens(logits, tokens, DRAWN, [row_seed], step)[:, None]], dim=1)
        assert row == tokens[0, len(prompt) :].tolist()


@pytest.mark.parametrize("refill", [True, False], ids=["refilled", "as it was"])
def test_longrope_answers_that_grow_beyond_the_original_context_are_those_of_the_full_forward(
    refill: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # rows that begin before, at and beyond the border of 13 tokens, and so cross it at different steps or never
    half = SMALL.d_head // 2
    long = LongRope((1.0,) * half, tuple(3.0 + 2 * i for i in range(half)), 13, factor=4.0)
    config = msgspec.structs.replace(SMALL, rope_scaling=long)
    params, prompts = random_params(config, 3, torch.float64), prompts_of([9, 13, 17], 3)
    if not refill:
        monkeypatch.setattr(inference_generate, "_refill", lambda *_: None)
    found = greedy(Model(llama.FAMILY, config), params, prompts, max_new_tokens=9, stop_ids=[])
    expected = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(9):
            tokens.append(int(Model(llama.FAMILY, config).forward(params, torch.tensor([tokens]))[0, -1].argmax()))
        expected.append(tokens[len(prompt) :])
    assert (found == expected) == refill


def test_generation_is_reproducible_and_a_prompt_answers_by_its_place_and_seed() -> None:
    params, prompts = random_params(SMALL, 1, torch.float64), prompts_of([4, 4, 9], 1)
    run = partial(generate, MODEL, params, sampling=DRAWN, max_new_tokens=20, stop_ids=[])
    first = run(prompts=prompts, seed=0)
    assert run(prompts=prompts, seed=0) == first
    assert run(prompts=prompts[:2], seed=0) == first[:2]
    assert run(prompts=prompts, seed=1) != first
    same = run(prompts=[prompts[0]] * 2, seed=0)
    assert same[0] == first[0]
    assert same[1] != first[0]


def test_deltas_and_quantized_leaves_decode_as_what_they_stand_for() -> None:
    params, prompts = random_params(SMALL, 2, torch.float64), prompts_of([5, 2], 2)
    generator, name = torch.Generator().manual_seed(0), "model.layers.1.mlp.up_proj.weight"
    out, in_ = params[name].shape
    a, b = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((3, in_), (out, 3)))
    deltas, rule = {name: Delta(a, b)}, Lora(rank=3, alpha=3.0, targets=(name,))
    run = partial(greedy, MODEL, prompts=prompts, max_new_tokens=9, stop_ids=[])
    assert run(rule.apply(params, deltas)) == run(rule.merge(params, deltas)) != run(params)
    q = QInt8(torch.randint(-127, 128, (out, in_), generator=generator).to(torch.int8), torch.full((out, 1), 0.01))
    dense = {**params, name: dequantize(q, torch.float64)}
    assert run({**params, name: q}) == run(dense) != run(params)


def test_the_cache_has_the_dtype_and_device_of_the_embedding() -> None:
    half = {name: w.bfloat16() for name, w in random_params(SMALL).items()}
    assert [len(row) for row in greedy(MODEL, half, [[1, 2], [3]], max_new_tokens=4, stop_ids=[])] == [4, 4]


def test_int4_leaves_are_packed_once_and_for_bfloat16_alone(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, params, text, asked = demo
    calls: list[Any] = []
    pack, name = packed, "model.layers.0.mlp.up_proj.weight"
    monkeypatch.setattr(inference_generate, "packed", lambda params: calls.append(pack(params)) or calls[-1])
    rule = Quantization(Int4(), (name,))
    answered((model, rule.quantize(params), text, asked), max_new_tokens=3)
    assert not calls
    half = rule.quantize({key: w.bfloat16() for key, w in params.items()})
    answered((model, half, text, asked), 1, max_new_tokens=3)
    assert isinstance(calls[0][name], PackedInt4)
    assert len(calls) == 5
    assert all(later[name] is calls[0][name] for later in calls)


def test_a_model_whose_blocks_are_recomputed_decodes_alike() -> None:
    params, prompts = random_params(SMALL), prompts_of([3, 5], 0)
    run = partial(greedy, params=params, prompts=prompts, max_new_tokens=6, stop_ids=[])
    assert run(MODEL._replace(block_transform=remat)) == run(MODEL)


def test_nothing_is_computed_after_the_last_row_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    params, prompts, calls = random_params(SMALL, 3), prompts_of([3, 5], 3), []
    rows = greedy(MODEL, params, prompts, max_new_tokens=12, stop_ids=[])
    decode = decoder.decode
    monkeypatch.setattr(decoder, "decode", lambda *args: calls.append(1) or decode(*args))
    greedy(MODEL, params, prompts, max_new_tokens=12, stop_ids=[rows[0][2], rows[1][4]])
    assert len(calls) <= 5
    steps = stream(MODEL, params, prompts, sampling=Sampling(), row_seeds=[0, 0], max_new_tokens=12)
    calls.clear()
    assert [step.tolist() for step in islice(steps, 2)] == [list(column) for column in list(zip(*rows, strict=True))[:2]]
    assert len(calls) == 2
    assert torch.is_grad_enabled()


def test_a_caller_may_differentiate_between_steps() -> None:
    steps = stream(MODEL, random_params(SMALL), [[1]], sampling=Sampling(), row_seeds=[0], max_new_tokens=2)
    for _ in steps:
        assert torch.is_grad_enabled()


def test_the_block_is_compiled_at_most_twice_for_a_batch() -> None:
    """In a process of its own: torch can't trace the checks of signatures that the tests run under."""
    assert run_script("generate_compiled") == "2\n"


def test_stream_refuses_an_empty_prompt() -> None:
    with pytest.raises(ValueError, match="generate: a prompt is empty, expected at least one token"):
        next(stream(MODEL, random_params(SMALL), [[]], sampling=Sampling(), row_seeds=[0], max_new_tokens=1))


def decoded(tokens: Sequence[int], table: Sequence[bytes]) -> str:
    return b"".join(table[i] for i in tokens).decode("utf-8", "replace")


@given(
    text=st.text(st.sampled_from("abé€𝄞\n "), max_size=20),
    cuts=st.sets(st.integers(1, 60)),
    stops=st.lists(st.text(st.sampled_from("ab€\n"), min_size=1, max_size=4), max_size=3),
)
def test_pieces_are_the_text_up_to_the_first_stop_string(text: str, cuts: set[int], stops: list[str]) -> None:
    raw = text.encode()
    borders = [0, *sorted(cut for cut in cuts if cut < len(raw)), len(raw)]
    table = [raw[a:b] for a, b in pairwise(borders)]
    decode = partial(decoded, table=table)
    read: list[int] = []

    def tokens() -> Iterator[int]:
        for i in range(len(table)):
            read.append(i)
            yield i

    shown, upto = "", []
    for piece in pieces(tokens(), decode, stops):
        assert piece
        shown += piece
        upto.append((shown, len(read)))
    ends = next((n for n in range(len(table) + 1) if any(stop in decode(range(n)) for stop in stops)), None)
    whole = text if ends is None else decode(range(ends))
    expected = whole[: min((whole.find(stop) for stop in stops if stop in whole), default=len(whole))]
    assert shown == expected
    assert len(read) == (len(table) if ends is None else ends)
    for so_far, n in upto:  # nothing came later than it had to: with no stop string, only incomplete characters wait
        assert stops or so_far == decode(range(n)).rstrip("\N{REPLACEMENT CHARACTER}")


def test_bytes_that_are_no_character_are_shown_in_the_end() -> None:
    decode = partial(decoded, table=[b"a", b"\xe2", b"\x82", b"b"])
    assert list(pieces([0, 1, 2, 3], decode, [])) == ["a", "\N{REPLACEMENT CHARACTER}b"]
    assert list(pieces([0, 1], decode, [])) == ["a", "\N{REPLACEMENT CHARACTER}"]


@pytest.fixture(scope="module")
def demo() -> tuple[Model, dict[str, Tensor], tokenizer.Tokenizer, list[list[int]]]:
    folder = paths.locate("demo")
    text = tokenizer.open_tokenizer(folder)
    template = open_template(folder, text)
    asked = [
        [{"role": "user", "content": words}]
        for words in ("a b c", "one apple, please, and two pears", "x", "send it to 1 Elm St")
    ]
    model = models.open(folder)
    return model, model.init(3, std=0.2), text, [encode_prompt(text, template, one) for one in asked]


def answered(demo: Any, batch_size: int = 2, stop_ids: Sequence[int] = (), stops: Sequence[str] = (), **more: Any) -> list[str]:
    model, params, text, asked = demo
    options = {"sampling": Sampling(), "seed": 0, "max_new_tokens": 12, "on_progress": lambda done: None, **more}
    return answers(model, params, asked, text, batch_size=batch_size, stop_ids=stop_ids, stop_strings=stops, **options)


def test_answers_come_in_order_whatever_the_batches(demo: Any) -> None:
    model, params, text, asked = demo
    rows = [greedy(model, params, [prompt], max_new_tokens=12, stop_ids=[])[0] for prompt in asked]
    expected = [text.decode(row, skip_special=True) for row in rows]
    progress: list[int] = []
    assert answered(demo, 3, on_progress=progress.append) == expected
    assert progress == [3, 4]
    drawn = [answered(demo, size, sampling=Sampling(temperature=1.0)) for size in (1, 2, 4)]
    assert drawn[0] == drawn[1] == drawn[2] != expected
    assert answered(demo, seed=1, sampling=Sampling(temperature=1.0)) != drawn[0]
    cut = answered(demo, stop_ids=[rows[1][3]])
    assert cut[1] == text.decode(rows[1][: rows[1].index(rows[1][3])], skip_special=True)


def test_answers_end_before_a_stop_string_that_lies_across_tokens(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, params, text, asked = demo
    free = answered(demo)
    row = greedy(model, params, [asked[1]], max_new_tokens=12, stop_ids=[])[0]
    border = len(text.decode(row[:5], skip_special=True))
    stop = free[1][border - 1 : border + 1]
    ended = answered(demo, stops=["never seen", stop])
    assert ended == [one[: one.index(stop)] if stop in one else one for one in free]
    assert ended != free
    shown = pieces(row, partial(text.decode, skip_special=True), [stop])
    assert "".join(shown) == ended[1]
    calls: list[int] = []
    decode = decoder.decode
    monkeypatch.setattr(decoder, "decode", lambda *args: calls.append(1) or decode(*args))
    assert answered((model, params, text, asked[1:2]), stops=[stop]) == ended[1:2]
    assert len(calls) == next(n for n in range(13) if stop in text.decode(row[:n], skip_special=True)) < 12


def test_a_stop_string_that_is_a_special_token_is_that_token(demo: Any) -> None:
    model, params, text, asked = demo
    token = greedy(model, params, [asked[1]], max_new_tokens=12, stop_ids=[])[0][3]
    marked = model, params, text._replace(special={**text.special, "<|halt|>": token}), asked
    ended = answered(marked, stops=["<|halt|>"])
    assert ended == answered(marked, stop_ids=[token]) != answered(marked)


@pytest.mark.parametrize("run", [answered, lambda demo, stops: list(pieces([1], str, stops))])
def test_an_empty_stop_string_is_refused(demo: Any, run: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="generate: a stop string is empty, expected at least one character"):
        run(demo, stops=[""])
