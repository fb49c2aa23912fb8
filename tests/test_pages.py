"""The generated pages show what the CSV files hold, and the claims' tables say what their intervals say."""

from pathlib import Path

import pytest

from benchmarks import claims_page, engine_page, results_page

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("name", "fill"),
    [
        ("engine.md", engine_page.with_tables),
        ("results.md", lambda page: results_page.with_tables(page, results_page.RESULTS)),
    ],
)
def test_a_page_is_what_its_command_writes(name, fill):
    page = (ROOT / "docs" / name).read_text()
    assert fill(page) == page, f"run python -m benchmarks.{name.removesuffix('.md')}_page"


def run(block: str, seed: int, accuracy: float, **others: str) -> claims_page.Row:
    """Return a row of claims.csv; what is not given is the same in all rows."""
    fixed = {"depth": "8", "levels": "1", "norm": "tdbn", "surrogate_width": "1", "dormant_first_end": "0.5"}
    return {**fixed, "block": block, "seed": str(seed), "accuracy": str(accuracy), **others}


# Differences of 2, 3 and 4 points have a mean of 3 and a standard deviation of 1: 3 ± 4.303·1/√3 = 3 ± 2.48.
@pytest.mark.parametrize(
    ("gains", "difference", "verdict"),
    [
        ((2, 3, 4), "+3.00 ± 2.48", "shows"),
        ((-2, -3, -4), "-3.00 ± 2.48", "the opposite"),
        ((-2, 3, 2), "+1.00 ± 6.57", "does not show"),
    ],
)
def test_an_interval_decides(gains, difference, verdict):
    plain = [run("plain", seed, 0.5) for seed in range(3)]
    ds = [run("ds", seed, 0.5 + gain / 100) for seed, gain in enumerate(gains)]
    lone = run("ds", 7, 0.9)  # has no partner
    ds_mean, holding = 50 + sum(gains) / 3, sum(gain > 0 for gain in gains)
    line = f"| 8 | K = 1 | tdBN, width 1 | 50.00 | {ds_mean:.2f} | {difference} | {holding} of 3 | {verdict} |"
    assert line in claims_page.blocks_table([*ds, lone, *plain])


def test_pairs_differ_in_one_thing_alone():
    rows = [run("plain", 0, 0.5), run("ds", 0, 0.6, depth="20"), run("ds", 0, 0.6, norm="batchnorm"), run("ds", 1, 0.6)]
    assert claims_page.pairs(rows, "block", ("plain", "ds")) == []


def test_gradients_are_compared_in_decades():
    columns = {f"gradient_{layers}_{moment}": "0.01" for layers in ("first", "last") for moment in ("start", "end")}
    columns |= {"zero_gradient_first_start": "0.5", "zero_gradient_first_end": "0.5"}
    rows = [run("plain", 0, 0.5, **columns), run("ds", 0, 0.5, **{**columns, "gradient_first_end": "1"})]
    line = "after training, decades | 8 | all | tdBN, width 1 | 0.00 | 2.00 | +2.00 | 1 of 1 | one pair |"
    assert line in claims_page.gradients_table(rows)


def test_a_training_that_went_on_after_another_has_one_line():
    epochs = [("cifar10", 1, 0.5), ("cifar10-relu", 1, 0.4), ("cifar10", 2, 0.6)]
    rows = [
        {
            "name": name,
            "recipe": "cifar10",
            "options": "",
            "epoch": str(epoch),
            "test_accuracy": str(accuracy),
            "device": "a card",
        }
        for name, epoch, accuracy in epochs
    ]
    table = results_page.trainings_table(rows)
    assert "| cifar10 | `cifar10 ` | 2 | 60.00 | 60.00 | 94.25 | a card |" in table
    assert table.count("| cifar10 |") == 1


def test_events_have_a_line_for_each_style():
    rows = [
        {"name": f"nmnist-{style}-{seed}", "epoch": epoch, "test_accuracy": accuracy, "device": "a card"}
        for style, seed, epoch, accuracy in (
            ("own", 0, "1", "0.5"), ("own", 0, "2", "0.9"), ("own", 1, "2", "1"), ("paper", 0, "2", "0.8"),
        )
    ]  # fmt: skip
    table = results_page.events_table(rows)
    assert "| nmnist-own-0, -1 | 2 | 95.0 (90.0 to 100.0) | a card |" in table
    assert "| nmnist-paper-0 | 2 | 80.0 | a card |" in table


def test_a_gradient_of_zero_has_no_interval():
    rows = [
        {"block": block, "depth": "44", "levels": "1", "seed": seed, "norm": "tdbn", "surrogate_width": "0.5"}
        | {"zero_gradient_first_start": "0.5", "zero_gradient_first_end": "1"}
        | {f"gradient_{layer}_{moment}": "1e-3" for layer in ("first", "last") for moment in ("start", "end")}
        | ({"gradient_first_end": "0"} if block == "plain" else {})
        for block in ("plain", "ds")
        for seed in "01"
    ]
    table = claims_page.gradients_table(rows)
    assert "| tdBN, width 0.5 | -inf | 0.00 | +inf | 2 of 2 | no gradient |" in table
