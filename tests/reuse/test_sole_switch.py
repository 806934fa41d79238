"""A live model is one thread's: who switches or calls it during another's switch is told."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_net import TinyNet
from torch import Tensor, nn

import fusionkit
from fusionkit import Bundle, Dense, ReuseModule, compress
from fusionkit.errors import FusionKitError

States = dict[str, dict[str, Tensor]]


class Slow(Bundle):
    """Stops in the midst of each switch until it is let go."""

    inside: threading.Event
    go: threading.Event

    def tensor(self, *asked: Any) -> Tensor | None:
        self.inside.set()
        self.go.wait(10)
        return super().tensor(*asked)


def slow(base: TinyNet, finetuned: States, folder: Path) -> Slow:
    compress(base, finetuned, Dense(), folder / "b", private=["head.*"])
    bundle = Slow(folder / "b", base)
    bundle.inside, bundle.go = threading.Event(), threading.Event()
    return bundle


def meanwhile(bundle: Slow, work: Callable[[], object], *others: Callable[[], object]) -> list[str]:
    """What others are told while a thread is inside a switch."""
    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert bundle.inside.wait(10)
        told = []
        for other in others:
            with pytest.raises(FusionKitError) as caught:
                other()
            told.append(str(caught.value))
        return told
    finally:
        bundle.go.set()
        thread.join()


def test_a_module_is_switched_by_one_thread(
    base: TinyNet, finetuned: States, tmp_path: Path
) -> None:
    bundle = slow(base, finetuned, tmp_path)
    module = ReuseModule(TinyNet(), bundle, base=base)
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    told = meanwhile(
        bundle,
        lambda: module.switch("bee"),
        lambda: module.switch("ant"),
        lambda: fusionkit.switch(module.model, bundle, None),
        lambda: module(tokens),
    )
    assert ["another thread is switching this model now" in each for each in told[:2]] == [True] * 2
    assert "called while another thread is switching it; hold a lock" in told[2]
    assert module.task == "bee"
    assert torch.equal(module.model.hidden.weight, bundle.state_dict("bee")["hidden.weight"])
    module.switch("ant")
    module(tokens)


def test_switch_of_a_plain_model(base: TinyNet, finetuned: States, tmp_path: Path) -> None:
    bundle = slow(base, finetuned, tmp_path)
    model, other = TinyNet(), TinyNet()
    compiled = torch.compile(model)
    assert isinstance(compiled, nn.Module)
    (told,) = meanwhile(
        bundle,
        lambda: fusionkit.switch(model, bundle, "bee"),
        lambda: fusionkit.switch(compiled, bundle, "ant"),
    )
    assert told.startswith("TinyNet: another thread is switching this model now")
    assert torch.equal(model.hidden.weight, bundle.state_dict("bee")["hidden.weight"])
    fusionkit.switch(other, bundle, "ant")
