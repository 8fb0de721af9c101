"""Blocks compiled once for all layers, steps and lengths, each in one graph; and what happens without a compiler.

In processes of their own; see tests/support/scripts.
"""

from pathlib import Path

from support.scripts import run_script


def test_the_number_of_graphs_depends_on_neither_depth_nor_steps_nor_lengths_nor_codes() -> None:
    """One for the first layer, whose input needs no gradient, one for the others; both again for lengths of any size; and for
    a block that is computed again, its forward without a gradient. Every one is whole: no part of a block runs outside. A
    block over codes of all schemes is one graph wherever a block over plain weights is.
    """
    deep, two_kinds, shallow_quantized = eval(run_script("compiled_counted").replace(" []", ""))
    assert shallow_quantized == deep
    assert deep <= 7  # one more for each of the five layers would be too many
    assert two_kinds <= 2 * deep


def test_decoding_a_weight_is_one_kernel_as_a_gpu_would_run_it_and_changes_no_bit() -> None:
    assert eval(run_script("compiled_decoded")) == [1, 1]


def test_no_decoded_weight_is_kept_or_made_before_its_product_eager_or_compiled() -> None:
    assert run_script("compiled_kept") == "codes 12\n"


def test_one_wrap_around_two_models_keeps_them_apart() -> None:
    assert run_script("compiled_two") == "same\n"


def test_models_of_any_number_in_one_process_all_stay_compiled() -> None:
    """torch's limit of 8 graphs is not shared by all blocks: ten models of one layer run compiled, every one."""
    assert run_script("compiled_many") == "1 " * 10 + "[]\n"


def test_a_backward_without_a_kernel_is_found_before_the_first_forward_has_run() -> None:
    """As where a card's shared memory is too small for a head's gradient: later nothing could be run in the block's place."""
    printed = run_script("compiled_unlowered")
    assert printed.startswith("1 compiled: blocks run as they are, because torch.compile could not compile them (Lowering")
    assert "needs 132 KiB" in printed


def test_a_probe_of_compiled_blocks_receives_the_same_outputs_and_gradients() -> None:
    assert run_script("compiled_probed") == "True []\n"


def test_without_a_compiler_blocks_run_as_they_are_and_say_so_once(tmp_path: Path) -> None:
    printed = run_script("compiled_without", CXX=str(tmp_path / "no-compiler"), TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert printed.startswith(
        "1 compiled: blocks run as they are, because torch.compile could not compile them (InvalidCxxCompiler"
    )


def test_an_error_of_the_block_is_the_blocks_own() -> None:
    assert run_script("compiled_broken") == "of the block\n"


def test_steps_that_are_not_compiled_import_no_compiler() -> None:
    assert run_script("steps_alone").strip() == "[]"
