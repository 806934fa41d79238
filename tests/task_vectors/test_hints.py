"""Every mend that a message gives is followed as it is written, and the right model comes out."""

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import fusionkit
from fusionkit import Checkpoint, Family, ReuseModule
from fusionkit.errors import BundleError, FamilyError, FusionKitError

State = dict[str, Tensor]


class Encoder(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, width)
        self.up = nn.Linear(width, 6)
        self.down = nn.Linear(6, width)


class Classifier(nn.Module):
    """An encoder under a prefix, and a head of the task's own."""

    def __init__(self, classes: int = 3, width: int = 4) -> None:
        super().__init__()
        self.enc = Encoder(width)
        self.head = nn.Linear(width, classes)


def tuned_from(model: nn.Module, seed: int = 1) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + 0.25 * torch.randn(tensor.shape, generator=generator).round()
        for name, tensor in model.state_dict().items()
    }


@pytest.fixture
def model() -> Classifier:
    torch.manual_seed(0)
    return Classifier()


def message(base: Any, finetuned: Mapping[str, Any], **settings: Any) -> str:
    with pytest.raises(FusionKitError) as caught:
        Family(base, finetuned, **settings).check_frozen()
    return str(caught.value)


def said(text: str, pattern: str) -> str:
    """What stands in a message at the place of a pattern's group."""
    found = re.search(pattern, text, re.DOTALL)
    assert found, text
    return found.group(1)


def check(
    base: Any, finetuned: Mapping[str, Any], wanted: Mapping[str, State], live: Any, **settings: Any
) -> None:
    """Compress, and compare whole models and a switched one with the fine-tuned tensors.

    Args:
        wanted: task → its tensors, by the live model's names; those that it lacks are its own.
        live: the base, as a module.
    """
    bundle = fusionkit.compress(base, finetuned, fusionkit.Dense("fp32"), **settings)
    module = ReuseModule(live, bundle=bundle)
    for task, tensors in wanted.items():
        module.switch(task)
        for name, tensor in live.state_dict().items():
            if name in tensors:
                torch.testing.assert_close(tensor, tensors[name], rtol=0, atol=1e-6)
        assert tensors.keys() <= live.state_dict().keys()
        state = bundle.state_dict(task)
        for name in state.keys() & tensors.keys():
            torch.testing.assert_close(state[name], tensors[name], rtol=0, atol=1e-6)
    module.switch(None)  # `live` may share its tensors with what the next check is given


# --- a tensor that one of the two lacks -------------------------------------------------------


def test_frozen_where_the_tasks_have_the_bases(model: Classifier) -> None:
    base, tuned = model.state_dict(), tuned_from(model)
    whole = {**tuned, "enc.up.weight": base["enc.up.weight"].clone()}
    del tuned["enc.up.weight"]
    text = message(base, {"a": tuned})
    name = said(text, r"misses tensor '(.+?)' \(declare it frozen if the tasks have the base's")
    check(base, {"a": tuned}, {"a": whole}, model, frozen=[name])


def test_a_stack_is_called_by_its_own_name() -> None:
    base = {"w": torch.randn(2), "mlp.experts.up": torch.randn(2, 3, 3)}
    tuned = {"w": base["w"] + 1}
    text = message(base, {"a": tuned})
    assert text.count("\n  - ") == 1
    name = said(text, r"misses tensor '(.+?)' \(declare it frozen")
    bundle = fusionkit.compress(base, {"a": tuned}, fusionkit.Dense("fp32"), frozen=[name])
    assert torch.equal(bundle.state_dict("a")["mlp.experts.up"], base["mlp.experts.up"])


def test_ignore_where_no_task_needs_it(model: Classifier) -> None:
    base, tuned = {**model.state_dict(), "pooler.weight": torch.randn(4, 4)}, tuned_from(model)
    text = message(base, {"a": tuned})
    name = said(text, r"misses tensor '(.+?)' \(.*, ignore it if no one needs it\)")
    check(base, {"a": tuned}, {"a": tuned}, model, ignore=[name])


def test_a_tensor_that_other_tasks_have_is_saved_into_this_one_too(model: Classifier) -> None:
    base, one, other = model.state_dict(), tuned_from(model), tuned_from(model, seed=2)
    kept = base["head.bias"].clone()
    del other["head.bias"]
    text = message(base, {"a": one, "b": other})
    assert "frozen" not in text  # of the other task it would be untrue
    pattern = r"\(task 'b'\): misses tensor '(.+?)' \(other tasks have it: save it into this one"
    other[said(text, pattern)] = kept
    check(base, {"a": one, "b": other}, {"a": one, "b": other}, model)


@pytest.mark.parametrize("rows", [3, 7])
def test_private_where_the_model_has_what_the_base_lacks(model: Classifier, rows: int) -> None:
    base = {name: t.clone() for name, t in model.state_dict().items() if "head" not in name}
    tuned = tuned_from(Classifier(rows))
    text = message(base, {"a": tuned})
    pattern = r"has tensor '(head\.\w+)', which the base lacks \(declare it private if the task's "
    private = re.findall(pattern, text)
    assert private == ["head.weight", "head.bias"]
    check(base, {"a": tuned}, {"a": tuned}, model, private=private)


def test_ignore_where_the_model_lacks_it_too(model: Classifier) -> None:
    base, tuned = model.state_dict(), tuned_from(model)
    more = {**tuned, "rotary.inv_freq": torch.randn(4)}
    text = message(base, {"a": more})
    pattern = r"has tensor '(.+?)', which the base lacks \(.*, ignore it if no one needs it\)"
    check(base, {"a": more}, {"a": tuned}, model, ignore=[said(text, pattern)])


def test_a_private_tensor_without_a_place(model: Classifier) -> None:
    base, tuned = model.state_dict(), {**tuned_from(model), "aux": torch.randn(2)}
    bundle = fusionkit.compress(base, {"a": tuned}, fusionkit.Dense("fp32"), private=["aux"])
    with pytest.raises(BundleError) as caught:
        ReuseModule(model, bundle=bundle).switch("a")
    text = str(caught.value)
    name = said(text, r"private tensor '(.+?)' has no place in Classifier; .*`ignore`")
    check(base, {"a": tuned}, {"a": tuned_from(model)}, model, ignore=[name])
    assert "build the model with a tensor of that name" in text
    fresh = Classifier()
    fresh.load_state_dict(base)
    setattr(fresh, name, nn.Parameter(torch.zeros(2)))
    check(base, {"a": tuned}, {"a": tuned}, fresh, private=[name])


def test_a_buffer_without_a_place() -> None:
    def net(persistent: bool) -> nn.Module:
        made = nn.Linear(2, 2)
        made.register_buffer("seen", torch.zeros(3, dtype=torch.int64), persistent)
        return made

    torch.manual_seed(0)
    whole = net(True)
    base = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    tuned = {**tuned_from(nn.Linear(2, 2)), "seen": torch.tensor([1, 2, 3])}
    bundle = fusionkit.compress(base, {"a": tuned}, fusionkit.Dense("fp32"))
    bare = net(False)
    bare.load_state_dict({n: t for n, t in base.items() if n != "seen"})
    with pytest.raises(BundleError) as caught:
        ReuseModule(bare, bundle=bundle).switch("a")
    pattern = r"changes '(.+?)', which has no place in the model; build .*persistent\), .*`ignore`"
    name = said(str(caught.value), pattern)
    check(base, {"a": tuned}, {"a": tuned}, whole)
    left = {n: t for n, t in tuned.items() if n != name}
    whole.load_state_dict(base)
    check(base, {"a": tuned}, {"a": left}, bare, ignore=[name])


# --- shapes -----------------------------------------------------------------------------------


def test_private_where_heads_have_other_shapes(model: Classifier) -> None:
    base, tuned = model.state_dict(), tuned_from(Classifier(classes=7))
    text = message(base, {"a": tuned})
    private = re.findall(
        r"tensor '(\S+)' has shape .* \(declare it private to store it whole", text
    )
    assert private == ["head.weight", "head.bias"]
    check(base, {"a": tuned}, {"a": tuned}, model, private=private)


def test_a_model_of_another_size_is_called_that(model: Classifier) -> None:
    text = message(model.state_dict(), {"a": tuned_from(Classifier(width=8))})
    assert "in other shapes than the base, 'enc.embed.weight' in [5, 8] for [5, 4]" in text
    assert "give the base that it was fine-tuned from" in text
    assert "private" not in text
    assert text.count("\n  - ") == 1


# --- names ------------------------------------------------------------------------------------


def test_a_prefix_of_the_fine_tune_is_renamed_or_put_before_the_base(
    tmp_path: Path, model: Classifier
) -> None:
    """The base is a bare encoder; the fine-tune has it under `enc.`, beside a head."""
    base, tuned = model.enc.state_dict(), tuned_from(model)
    save_file(base, tmp_path / "base.safetensors")
    text = message(tmp_path / "base.safetensors", {"a": tuned}, private=["head.*"])
    rename = ast.literal_eval(said(text, r"with the prefix 'enc\.': set rename=(\{.*?\})"))
    own = {name.removeprefix("enc."): tensor for name, tensor in tuned.items()}
    encoder = {name: tensor for name, tensor in own.items() if not name.startswith("head")}
    bundle = fusionkit.compress(
        base, {"a": tuned}, fusionkit.Dense("fp32"), private=["head.*"], rename=rename
    )
    state = bundle.state_dict("a")
    assert state.keys() == own.keys()
    assert all(torch.allclose(state[name], tensor, 0, 1e-6) for name, tensor in own.items())
    check(base, {"a": tuned}, {"a": encoder}, model.enc, rename=rename, ignore=["head.*"])

    prefix = said(text, r"or give the base as Checkpoint.of\(…, add_prefix='(.*?)'\)")
    base = Checkpoint.of(tmp_path / "base.safetensors", add_prefix=prefix)
    model = Classifier()
    model.enc.load_state_dict(Checkpoint.of(tmp_path / "base.safetensors"))
    check(base, {"a": tuned}, {"a": tuned}, model, private=["head.*"])


def test_a_prefix_of_the_base_is_renamed_or_put_before_the_fine_tune(
    tmp_path: Path, model: Classifier
) -> None:
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    encoder = tuned_from(model.enc)
    save_file(encoder, tmp_path / "a.safetensors")
    settings = {"frozen": ["head.*"]}
    text = message(base, {"a": tmp_path / "a.safetensors"}, **settings)
    wanted = {**base, **{f"enc.{name}": tensor for name, tensor in encoder.items()}}
    rename = ast.literal_eval(said(text, r"the prefix 'enc\.': set rename=(\{.*?\})"))
    check(base, {"a": encoder}, {"a": wanted}, model, rename=rename, **settings)

    model.load_state_dict(base)
    prefix = said(text, r"or give \S+ \(task 'a'\) as Checkpoint.of\(…, add_prefix='(.*?)'\)")
    tuned = Checkpoint.of(tmp_path / "a.safetensors", add_prefix=prefix)
    check(base, {"a": tuned}, {"a": wanted}, model, **settings)


def test_no_renaming_is_offered_that_would_rename_the_base_too() -> None:
    base = {f"enc.{i}.w": torch.randn(2) for i in range(3)}
    tuned = {f"enc.{name}": tensor + 1 for name, tensor in base.items()}
    text = message(base, {"a": tuned})
    assert "set rename" not in text
    prefix = said(text, r": give the base as Checkpoint.of\(…, add_prefix='(.*?)'\)")
    state = fusionkit.compress(
        Checkpoint.of(base, add_prefix=prefix), {"a": tuned}, fusionkit.Dense("fp32")
    ).state_dict("a")
    assert all(torch.allclose(state[name], tuned[name], 0, 1e-6) for name in tuned)


def test_another_model_or_other_names_are_said_first(model: Classifier) -> None:
    base, tuned = model.state_dict(), tuned_from(model)
    other = {name.replace("enc.", "body.").replace("head.", "top."): t for name, t in tuned.items()}
    text = message(base, {"a": other})
    assert "has 0 of the base's 7 tensors, and 7 others, as 'body.embed.weight'" in text
    assert "`rename` them; else it is not fine-tuned from this base" in text
    assert text.count("\n  - ") == 1
    assert "private" not in text
    assert "frozen" not in text
    rename = {"^body": "enc", "^top": "head"}
    check(base, {"a": other}, {"a": tuned}, model, rename=rename)


def test_a_file_of_what_was_trained_alone_is_no_other_model(model: Classifier) -> None:
    base, tuned = model.state_dict(), tuned_from(model)
    part = {"head.weight": tuned["head.weight"]}
    text = message(base, {"a": part})
    frozen = re.findall(r"misses tensor '(\S+)' \(declare it frozen", text)
    assert len(frozen) == 6
    check(base, {"a": part}, {"a": {**base, **part}}, model, frozen=frozen)


@pytest.mark.parametrize("way", ["strip", "add"])
def test_a_prefix_between_a_model_and_the_base_that_is_loaded_into_it(
    model: Classifier, way: str
) -> None:
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if way == "strip":
        live, base = Encoder(), Checkpoint.of(whole)
    else:
        live, base = nn.ModuleDict({"enc": Encoder()}), Checkpoint.of(model.enc.state_dict())
    with pytest.raises(FusionKitError, match="lacks") as caught:
        ReuseModule(live, base=base)
    prefix = said(str(caught.value), rf"give the base as Checkpoint.of\(…, {way}_prefix='(.*?)'\)")
    ReuseModule(live, base=Checkpoint.of(base, **{f"{way}_prefix": prefix}))
    loaded = live if way == "strip" else live["enc"]
    assert all(torch.equal(t, whole[f"enc.{n}"]) for n, t in loaded.state_dict().items())


def test_a_head_that_the_base_lacks_is_private_to_the_model_as_well(model: Classifier) -> None:
    base = {name: t.clone() for name, t in model.state_dict().items() if "head" not in name}
    with pytest.raises(FusionKitError, match=r"'head.weight' .*private if it is each task's own"):
        ReuseModule(model, base=Checkpoint.of(base))
    tuned = tuned_from(model)
    module = ReuseModule(
        model, base=Checkpoint.of(base), private=["head.*"], finetuned={"a": Checkpoint.of(tuned)}
    )
    module.switch("a")
    assert all(torch.equal(tensor, tuned[name]) for name, tensor in model.state_dict().items())


# --- frozen -----------------------------------------------------------------------------------


def test_what_is_frozen_by_mistake_is_taken_out_of_frozen(model: Classifier) -> None:
    base, tuned = model.state_dict(), tuned_from(model)
    text = message(base, {"a": tuned}, frozen=["enc.up.bias"])
    assert "'enc.up.bias' (task 'a')" in text
    with pytest.raises(FamilyError, match="take them out of `frozen`"):
        fusionkit.compress(base, {"a": tuned}, fusionkit.Dense("fp32"), frozen=["enc.up.bias"])
    check(base, {"a": tuned}, {"a": tuned}, model)
