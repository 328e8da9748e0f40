"""What is said of figures: nothing that the noise could have said too."""

import pytest

from secateur.advise.verdict import marked, quicker, verdict


def row(name, lost=0.0, ratio=1.0, size=100, *, interval=0.3, spread=0.01, state="measured", **rest):
    way, _, budget = name.partition(" ")
    return {"name": name, "way": way, "budget": budget, "lost": lost, "interval": interval, "ratio": ratio, "spread": spread, "bytes": size,
            "state": state, "careful": True, **rest}  # fmt: skip


DENSE = row("dense", size=400)


def test_the_front_is_over_loss_time_and_bytes_and_what_has_no_figures_is_not_on_it():
    rows = [row("structures macs=50%", 1.0, 0.6, 200), row("weights keep=20%", 1.0, 1.0, 200), row("int8", 0.1, 0.4, 110),
            {"name": "neurons", "way": "neurons", "budget": "", "state": "refused", "why": "none"}]  # fmt: skip
    dense = dict(DENSE)
    marked(dense, rows)
    assert [r.get("front") for r in (dense, *rows)] == [True, False, False, True, None]


@pytest.mark.parametrize("ratio, spread, says", [(0.5, 0.02, True), (0.985, 0.0, False), (0.9, 0.15, False), (1.2, 0.01, False)])
def test_quicker_means_beyond_the_noise(ratio, spread, says):
    assert quicker(row("structures", ratio=ratio, spread=spread)) is says


def test_one_that_stands_out_is_recommended():
    said = verdict(DENSE, [row("int8", 0.1, 0.7, 110), row("structures macs=50%", 0.8, 0.4, 200)], "accuracy", 1.0)
    assert said[0] == "int8 alone gives 70 % of the dense time, 110 B on disk, 0.10 ± 0.30 points of accuracy lost."
    assert "structures macs=50% is quickest: 40 % of the dense time" in said[1]
    assert said[-1] == "If time counts, take structures macs=50%."


def test_two_within_the_noise_are_not_told_apart():
    said = verdict(DENSE, [row("int8", 0.1, 0.44, 110, spread=0.03), row("structures macs=50%", 0.8, 0.4, 200)], "accuracy", 1.0)
    assert said[-1].startswith("structures macs=50% and int8 are equally quick within the noise")


def test_where_nothing_is_quicker_nothing_is_recommended():
    said = verdict(DENSE, [row("weights keep=20%", 0.5, 1.0, 90), row("structures macs=50%", 0.8, 0.97, 200, spread=0.1)], "accuracy", 1.0)
    assert "no pruning is quicker than the dense model beyond the noise; weights keep=20% is the smallest" in said[0]
    assert said[1] == "On this machine single zeros do not pay in time, not even at keep=20%."
    assert said[-1] == "Nothing within 1 point of accuracy saves time beyond the noise: keep the dense model, or choose by bytes."


def test_what_loses_too_much_is_not_recommended_however_quick():
    said = verdict(DENSE, [row("structures macs=35%", 7.0, 0.2, 50), row("structures macs=50%", 3.0, 0.3, 80)], "accuracy", 1.0)
    assert said[0] == "No pruning stays within 1 point of accuracy; structures macs=50% comes nearest with 3.00 ± 0.30."
    assert "take" not in said[-1]


def test_too_few_rows_to_tell_are_no_ground_for_advice():
    said = verdict(DENSE, [row("structures macs=50%", 0.0, 0.4, 200, interval=13.1)], "accuracy", 1.0)
    assert said[-1] == "The held-out rows tell losses apart to ± 13.1 only, so nothing is advised: compare on more rows."


def test_zeros_pay_from_some_share_on():
    rows = [row("weights keep=50%", 0, 1.0, 250), row("weights keep=20%", 0.5, 0.8, 120), row("weights keep=10%", 4, 0.5, 70)]
    assert "On this machine single zeros pay in time from keep=20% down." in verdict(DENSE, rows, "accuracy", 1.0)


def test_an_int8_that_is_not_there_says_what_to_install():
    why = 'onnxruntime is not installed.\n  Install it: pip install "secateur[onnx]"'
    rows = [{"name": "int8", "way": "int8", "budget": "", "state": "refused", "why": why}, row("structures macs=50%", 0.1, 0.5)]
    assert verdict(DENSE, rows, "accuracy", 1.0)[0]== (
        'int8 was refused: onnxruntime is not installed. Install it: pip install "secateur[onnx]".'
    )
    assert verdict(DENSE, [], "accuracy", 1.0) == ["Nothing was measured, so there is nothing to advise."]


def test_a_quick_search_says_that_it_was_quick():
    quick = [row("structures macs=50%", 0.1, 0.5) | {"careful": False}]
    assert verdict(DENSE, quick, "accuracy", 1.0)[-1].startswith("The pruning was quick")
    assert not verdict(DENSE, [*quick, row("structures macs=50%, careful", 0.1, 0.5)], "accuracy", 1.0)[-1].startswith("The pruning was quick")
