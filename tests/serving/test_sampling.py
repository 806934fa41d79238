"""The next token of each row."""

import pytest
import torch

from fusionkit.serving.sampling import Draw, generator, next_tokens

CHANCES = torch.tensor([0.5, 0.25, 0.15, 0.1])
LOGITS = CHANCES.log()


def shares(temperature: float, top_p: float, count: int = 4000) -> torch.Tensor:
    """How often each token is drawn, by one row's generator."""
    draw = Draw(temperature, top_p, generator(0))
    found = [next_tokens(LOGITS[None], [draw])[0] for _ in range(count)]
    return torch.bincount(torch.tensor(found), minlength=4) / count


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_tokens_are_drawn_by_their_probabilities(temperature: float) -> None:
    expected = (LOGITS / temperature).softmax(-1)
    assert (shares(temperature, 1.0) - expected).abs().max() < 0.03


def test_of_the_likeliest_that_reach_top_p_together() -> None:
    found = shares(1.0, 0.6)
    assert found[2:].sum() == 0
    assert abs(found[0] - 2 / 3) < 0.03


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (1e-9, 0.9), (1.0, 1e-6)])
def test_the_likeliest(temperature: float, top_p: float) -> None:
    assert shares(temperature, top_p, 20)[0] == 1


def test_a_row_is_drawn_as_alone() -> None:
    """Whatever the other rows are, and how they are drawn."""
    torch.manual_seed(0)
    logits = torch.randn(12, 50)
    settings = [(t, p) for t in (0.0, 0.7, 1.3) for p in (1.0, 0.9, 0.5, 0.2)]
    draws = [Draw(*each, generator(n)) for n, each in enumerate(settings)]
    together = [next_tokens(logits, draws) for _ in range(5)]
    for row, each in enumerate(settings):
        alone = Draw(*each, generator(row))
        assert [next_tokens(logits[row : row + 1], [alone])[0] for _ in range(5)] == [
            step[row] for step in together
        ]


def test_what_has_no_probability_is_never_drawn() -> None:
    logits = torch.full((1, 8), -torch.inf)
    logits[0, 3] = 0
    for top_p in (1.0, 0.5):
        draw = Draw(1.0, top_p, generator(None))
        assert {next_tokens(logits, [draw])[0] for _ in range(50)} == {3}
