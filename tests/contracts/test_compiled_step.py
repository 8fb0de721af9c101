"""A whole step under torch.compile is one graph and computes what the step as it is computes."""

from support.scripts import run_script


def test_a_compiled_step_is_one_graph_with_the_same_numbers() -> None:
    """Adapters with dropout, clipping, AdamW and a schedule: the second of three steps has no target and changes nothing."""
    n_graphs, skipped, worst = eval(run_script("compiled_step"))
    assert n_graphs == 1
    assert skipped == [0, 1, 0]
    assert worst < 1e-5
