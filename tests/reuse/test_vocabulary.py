"""Tasks with vocabularies of their own: a live model is resized for them, and back."""

import copy
import pickle
from pathlib import Path
from typing import Any, cast

import peft
import pytest
import torch
from checks import check_same
from processes import together
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from vocabularies import MODELS, ROWS, extended, logits, made

import fusionkit
from fusionkit import SVD, Checkpoint, Dense, Family, MagnitudePrune, Merged
from fusionkit.errors import BundleError, FamilyError
from fusionkit.merges.mean import Mean
from fusionkit.reuse.fused import Fused
from fusionkit.reuse.module import ReuseModule

WAYS = ("folder", "live", "file", "mapping")


def given(model: Any, way: str, folder: Path) -> Any:
    """A model as a source."""
    if way == "live":
        return model
    if way == "mapping":
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder)
    if way == "folder":
        return str(folder)
    bare = folder / "bare.safetensors"  # beside which no configuration speaks for it
    (folder / "model.safetensors").rename(bare)
    return str(bare)


def state_of(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", MODELS)
def test_each_task_has_its_own_vocabulary(kind: str, way: str, tmp_path: Path) -> None:
    base = made(kind)
    tuned = {
        "five": extended(base, 5),
        "none": extended(base, 0, seed=2),
        "eight": extended(base, 8, seed=3),
    }
    before, alone = state_of(base), logits(base, ROWS)
    sources = {task: given(model, way, tmp_path / task) for task, model in tuned.items()}
    model = copy.deepcopy(base)
    bundle = fusionkit.compress(given(base, way, tmp_path / "base"), sources, Dense("fp32"))
    module = ReuseModule(model, bundle=bundle)
    for task in ("five", "eight", "none", "five", None, "eight", None):
        module.switch(task)
        rows = ROWS if task is None else tuned[task].config.vocab_size
        wanted = alone if task is None else logits(tuned[task], rows)
        torch.testing.assert_close(logits(model, rows), wanted, rtol=1e-5, atol=1e-5)
        assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == rows
        head = model.get_output_embeddings()
        assert head.out_features == len(head.weight) == rows
        tied = base.get_output_embeddings().weight is base.get_input_embeddings().weight
        assert (head.weight is model.get_input_embeddings().weight) == tied
    check_same(state_of(model), before)
    for task, each in tuned.items():
        wanted_state = each.state_dict()
        state = bundle.state_dict(task)
        assert state.keys() <= wanted_state.keys()
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, wanted_state[name], rtol=1e-6, atol=1e-6)
            if name in bundle.added(task):
                assert torch.equal(tensor[ROWS:], wanted_state[name][ROWS:])


def test_the_live_model_generates_and_learns_in_the_tasks_size() -> None:
    base = made("llama, tied")
    tuned = extended(base)
    module = ReuseModule(copy.deepcopy(base), finetuned={"a": Checkpoint.of(tuned)})
    module.switch("a")
    model: Any = module.model
    ids = torch.tensor([[1, 42, 44, 7]])
    with torch.no_grad():
        found, wanted = (each(input_ids=ids, labels=ids).loss for each in (model, tuned))
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)
    texts = [each.generate(ids, max_new_tokens=5, do_sample=False) for each in (model, tuned)]
    assert torch.equal(*texts)
    embedding = model.get_input_embeddings()
    assert embedding.padding_idx == 0
    assert embedding.weight.requires_grad


def test_uncompressed_tasks(tmp_path: Path) -> None:
    base = made("t5")
    tuned = {"a": extended(base, 3), "b": extended(base, 9, seed=2)}
    sources = {task: given(each, "folder", tmp_path / task) for task, each in tuned.items()}
    module = ReuseModule(copy.deepcopy(base), finetuned=sources)
    for task in ("b", "a", "b"):
        module.switch(task)
        rows = tuned[task].config.vocab_size
        torch.testing.assert_close(logits(module.model, rows), logits(tuned[task], rows))
    module.switch(None)
    assert torch.equal(logits(module.model, ROWS), logits(base, ROWS))


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_is_tied_in_the_model_or_in_the_task_alone(tied: bool) -> None:
    base, apart = made("llama, tied"), made("llama, untied")
    apart.load_state_dict(base.state_dict())
    model, tuned = (base, extended(apart)) if tied else (apart, extended(base))
    bundle = fusionkit.compress(copy.deepcopy(base), {"a": tuned}, Dense("fp32"))
    module = ReuseModule(copy.deepcopy(model), bundle=bundle)
    for _ in range(2):
        module.switch("a")
        torch.testing.assert_close(logits(module.model, 45), logits(tuned, 45))
        module.switch(None)
        assert torch.equal(logits(module.model, ROWS), logits(base, ROWS))


def test_weights_that_are_kept_have_the_tasks_size() -> None:
    base = made("llama, tied")
    tuned = {"a": extended(base, 3), "b": extended(base, 9, seed=2), "c": extended(base, 0, seed=3)}
    bundle = fusionkit.compress(copy.deepcopy(base), tuned, Dense())
    plain = ReuseModule(copy.deepcopy(base), bundle=bundle)
    kept = ReuseModule(copy.deepcopy(base), bundle=bundle, cache_bytes=1 << 20)
    for task in ("a", "b", "a", None, "b", "c", "a"):
        plain.switch(task)
        kept.switch(task)
        check_same(state_of(kept.model), state_of(plain.model))
    assert [*kept._switcher.cached] == ["b", "c", "a"]
    room = sum(tensor.nbytes for tensor in kept._switcher.cached["b"].values())
    small = ReuseModule(copy.deepcopy(base), bundle=bundle, cache_bytes=room)
    for task in ("c", "b"):  # which is larger
        small.switch(task)
    assert [*small._switcher.cached] == ["b"]


def test_a_frozen_vocabulary_that_grew_is_kept_and_placed() -> None:
    base, name = made("llama, untied"), "model.embed_tokens.weight"
    state = extended(base).state_dict()
    state[name][:ROWS] = base.state_dict()[name]
    bundle = fusionkit.compress(copy.deepcopy(base), {"a": state}, Dense(), frozen=[name])
    module = ReuseModule(copy.deepcopy(base), bundle=bundle, cache_bytes=1 << 20)
    for task in ("a", None, "a"):
        module.switch(task)
        found = module.model.state_dict()[name]
        assert torch.equal(found, base.state_dict()[name] if task is None else state[name])


def test_a_resized_module_can_be_copied_and_pickled() -> None:
    base = made("llama, tied")
    bundle = fusionkit.compress(copy.deepcopy(base), {"a": extended(base)}, Dense())
    module = ReuseModule(base, bundle=bundle)
    module.switch("a")
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(logits(other.model, 45), logits(module.model, 45))
        other.switch(None)
        assert other.model.lm_head.weight.shape == (ROWS, 16)


def test_merges_merge_the_common_rows() -> None:
    base, name = made("llama, untied"), "lm_head.weight"
    tuned = {"a": extended(base, 3), "b": extended(base, 9, seed=2)}
    own = {task: model.state_dict()[name] for task, model in tuned.items()}
    mean = (own["a"][:ROWS] + own["b"][:ROWS]) / 2
    module = ReuseModule(copy.deepcopy(base))
    merged = fusionkit.compress(copy.deepcopy(base), tuned, Merged(Mean(), dtype="fp32"))
    for source in (Fused(Family(copy.deepcopy(base), tuned), Mean()), merged):
        module.reuse(source)
        for task in tuned:
            module.switch(task)
            found = module.model.state_dict()[name]
            torch.testing.assert_close(found[:ROWS], mean)
            assert torch.equal(found[ROWS:], own[task][ROWS:])
        module.switch(None)
        assert torch.equal(module.model.state_dict()[name], base.state_dict()[name])


SAVED: dict[str, dict[str, Any]] = {
    "nothing": {},
    "both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "the embedding": {"modules_to_save": ["embed_tokens"]},
    "the embedding, tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "adapted": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("kind", ["llama, tied", "llama, untied"])
def test_adapters_of_a_resized_model(kind: str, saved: str, tmp_path: Path) -> None:
    base = made(kind)
    base.save_pretrained(tmp_path / "base")
    tuned = copy.deepcopy(base)
    tuned.resize_token_embeddings(ROWS + 5, mean_resizing=False)
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **SAVED[saved]})
    adapted: Any = peft.get_peft_model(tuned, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    wanted = logits(adapted.eval().base_model.model, 45)
    for source in (str(tmp_path / "base"), copy.deepcopy(base)):
        bundle = fusionkit.compress(source, {"a": str(tmp_path / "adapter")}, Dense("fp32"))
        module = ReuseModule(copy.deepcopy(base), bundle=bundle)
        module.switch("a")
        torch.testing.assert_close(logits(module.model, 45), wanted, rtol=1e-4, atol=1e-5)
        module.switch(None)
        assert torch.equal(logits(module.model, ROWS), logits(base, ROWS))


@pytest.mark.parametrize("kind", ["llama, tied", "llama, untied", "bert, tied"])
def test_a_vocabulary_cut_down_is_refused_with_a_mend_that_works(kind: str) -> None:
    base = made(kind)
    tuned = extended(base, -6)
    with pytest.raises(FamilyError, match="a vocabulary cut down") as refusal:
        fusionkit.compress(copy.deepcopy(base), {"a": tuned}, SVD(rank=2))
    private = [
        name
        for line in str(refusal.value).splitlines()[1:]
        for name in line.rpartition("to store it whole: ")[2].split(", ")
    ]
    bundle = fusionkit.compress(copy.deepcopy(base), {"a": tuned}, Dense("fp32"), private=private)
    module = ReuseModule(copy.deepcopy(base), bundle=bundle)
    model: Any = module.model
    for _ in range(2):
        module.switch("a")
        torch.testing.assert_close(logits(model, 34), logits(tuned, 34))
        assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == 34
        module.switch(None)
        assert torch.equal(logits(model, ROWS), logits(base, ROWS))
        assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == ROWS


def test_a_task_that_can_not_be_read_leaves_the_base(tmp_path: Path) -> None:
    base, name = made("gpt2"), "transformer.wte.weight"
    bundle = fusionkit.compress(
        copy.deepcopy(base), {"a": extended(base)}, MagnitudePrune(0.5), tmp_path / "b"
    )
    module = ReuseModule(copy.deepcopy(base), bundle=bundle)
    module.switch("a")
    bundle.manifest.tasks["a"].added[name] = 4
    with pytest.raises(BundleError, match=f"the rows that task 'a' adds to '{name}' have shape"):
        module.switch("a")
    check_same(state_of(module.model), state_of(base))
    assert cast(Any, module.model).config.vocab_size == ROWS


def _sharded(rank: int, count: int) -> None:
    torch.distributed.init_process_group("gloo")
    base = made("llama, tied")
    bundle = fusionkit.compress(copy.deepcopy(base), {"a": extended(base)}, Dense())
    module = ReuseModule(base, bundle=bundle)
    module.shard(init_device_mesh("cpu", (count,)))
    said = "45 rows of 'model.embed_tokens.weight' where the model, which is sharded, has 40"
    with pytest.raises(BundleError, match=said):
        module.switch("a")


def test_a_sharded_model_has_no_room_for_them() -> None:
    together(1, _sharded)
