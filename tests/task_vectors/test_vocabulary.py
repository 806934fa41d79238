"""Families whose fine-tuned models have vocabularies of another size than their base's."""

import re
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from vocabularies import ROWS, extended, made

from fusionkit import Checkpoint, Family
from fusionkit.checkpoints.vocabulary import common_rows
from fusionkit.errors import FamilyError

WIDTH = 3
State = dict[str, Tensor]


def state(rows: int, seed: int = 0, **others: tuple[int, ...]) -> State:
    """A bare file's tensors: an embedding and a head, with its bias, of so many rows."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "embed_tokens.weight": (rows, WIDTH),
        "lm_head.weight": (rows, WIDTH),
        "lm_head.bias": (rows,),
        "mlp.weight": (4, WIDTH),
        **others,
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def refused(base: object, tuned: object, *said: str, **options: object) -> None:
    with pytest.raises(FamilyError, match="(?s)" + ".*".join(map(re.escape, said))):
        Family(base, {"a": tuned}, **options)  # type: ignore[arg-type, dict-item]


def test_common_rows_are_a_delta_and_added_ones_whole() -> None:
    base, tuned = state(7), state(9, seed=1)
    family = Family(base, {"a": tuned, "b": state(7, seed=2)})
    assert family.vocabulary == {
        "a": {"embed_tokens.weight": 2, "lm_head.weight": 2, "lm_head.bias": 2},
        "b": {},
    }
    for vectors in family:
        assert vectors.shape == base[vectors.name].shape
        common = tuned[vectors.name][: len(base[vectors.name])]
        assert torch.equal(vectors[0], common - base[vectors.name])
        assert torch.equal(vectors.tuned(0), common)
        assert torch.equal(vectors.stack()[0], vectors[0])
    rows = dict(family.added_rows("a"))
    assert rows.keys() == family.added("a").keys()
    assert all(torch.equal(own, tuned[name][7:]) for name, own in rows.items())
    assert not dict(family.added_rows("b"))
    with pytest.raises(FamilyError, match="has no task 'c'"):
        family.added("c")


def test_what_is_compressed_is_counted_without_them() -> None:
    base = state(7)
    family, before = (Family(base, {"a": state(rows, seed=1)}) for rows in (9, 7))
    assert family.sizes == before.sizes
    assert family.parameters == before.parameters
    assert family.bits_per_parameter == before.bits_per_parameter == 32


def test_a_vocabulary_that_was_padded_has_grown() -> None:
    base = state(50)
    padded = {n: torch.cat([t, t.new_zeros(14, *t.shape[1:])]) if len(t) == 50 else t
              for n, t in base.items()}  # fmt: skip
    family = Family(base, {"a": padded})
    assert all(not vectors[0].any() for vectors in family)
    assert [tuple(rows.shape) for _, rows in family.added_rows("a")][-1] == (14,)


def test_each_in_its_own_dtype() -> None:
    tuned = {name: tensor.bfloat16() for name, tensor in state(9, seed=1).items()}
    rows = dict(Family(state(7), {"a": tuned}).added_rows("a"))
    assert torch.equal(rows["lm_head.weight"], tuned["lm_head.weight"][7:])


def test_rows_along_a_later_axis() -> None:
    """As BART's `final_logits_bias` has them."""
    base, tuned = state(7, final_logits_bias=(1, 7)), state(9, 1, final_logits_bias=(1, 9))
    family = Family(base, {"a": tuned})
    assert torch.equal(
        dict(family.added_rows("a"))["final_logits_bias"], tuned["final_logits_bias"][:, 7:]
    )
    vectors = family.vectors("final_logits_bias")
    assert torch.equal(vectors[0], tuned["final_logits_bias"][:, :7] - base["final_logits_bias"])


def test_a_frozen_vocabulary_may_grow() -> None:
    base = state(7)
    tuned = {**state(9, seed=1), "embed_tokens.weight": torch.cat([base["embed_tokens.weight"],
             torch.ones(2, WIDTH)])}  # fmt: skip
    family = Family(base, {"a": tuned}, frozen=["embed_tokens.weight"])
    family.check_frozen()
    assert torch.equal(dict(family.added_rows("a"))["embed_tokens.weight"], torch.ones(2, WIDTH))


def test_a_head_tied_in_the_base_alone_is_compared_with_its_added_rows() -> None:
    base, tuned = state(7), state(9, seed=1)
    base["lm_head.weight"] = base["embed_tokens.weight"]
    tuned["lm_head.weight"] = tuned["embed_tokens.weight"].clone()
    assert Family(base, {"a": tuned}).tied == {"lm_head.weight": "embed_tokens.weight"}
    tuned["lm_head.weight"][8] += 1
    family = Family(base, {"a": tuned})
    assert not family.tied
    rows = dict(family.added_rows("a"))
    assert torch.equal(rows["lm_head.weight"], tuned["lm_head.weight"][7:])


def test_a_copy_in_memory_keeps_them() -> None:
    below = Checkpoint.of(state(9))
    copied = common_rows(below, {"lm_head.weight": (7, WIDTH)}).in_memory()
    assert copied.specs["lm_head.weight"].shape == (7, WIDTH)
    assert torch.equal(copied.added("lm_head.weight"), below["lm_head.weight"][7:])  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["mlp.weight", "encoder.layers.0.fc.weight"])
def test_more_rows_of_what_is_no_vocabulary_are_refused(name: str) -> None:
    base, tuned = state(7, **{name: (4, WIDTH)}), state(9, seed=1, **{name: (6, WIDTH)})
    refused(base, tuned, f"tensor '{name}' has shape [6, 3], the base's has [4, 3] (declare it")
    assert name in Family(base, {"a": tuned}, private=[name]).private["a"]


def test_a_head_of_an_unknown_class_is_no_vocabulary_of_its_own() -> None:
    base, tuned = state(7), state(7, seed=1) | {"lm_head.weight": torch.ones(9, WIDTH)}
    refused(base, tuned, "tensor 'lm_head.weight' has shape [9, 3], the base's has [7, 3]")


def test_wider_rows_are_refused() -> None:
    tuned = {**state(9, seed=1), "embed_tokens.weight": torch.ones(9, WIDTH + 1)}
    refused(state(7), tuned, "tensor 'embed_tokens.weight' has shape [9, 4]")


def test_positions_are_no_vocabulary(tmp_path: Path) -> None:
    base = made("gpt2")
    base.save_pretrained(tmp_path)
    tuned = load_file(tmp_path / "model.safetensors")
    tuned["transformer.wpe.weight"] = torch.ones(48, 16)
    save_file(tuned, tmp_path / "tuned.safetensors")
    refused(base, tmp_path / "tuned.safetensors", "'transformer.wpe.weight' has shape [48, 16]")


def test_embeddings_of_a_class_that_names_no_vocabulary() -> None:
    def net(rows: int, places: int = 5) -> nn.ModuleDict:
        return nn.ModuleDict({"item": nn.Embedding(rows, 2), "pos": nn.Embedding(places, 2)})

    assert Family(net(4), {"a": net(6)}).added("a") == {"item.weight": 2}
    refused(net(4), net(4, places=6), "'pos.weight' has shape [6, 2], the base's has [5, 2]")


def test_fewer_rows_are_refused_with_the_reason() -> None:
    base = made("llama, tied")
    refused(
        base,
        extended(base, -10),
        f"tensor 'model.embed_tokens.weight' has 30 rows where the base has {ROWS} (a vocabulary "
        "cut down)",
        "declare it private to store it whole: model.embed_tokens.weight, lm_head.weight",
    )


def test_an_adapter_without_the_heads_added_rows_is_refused(tmp_path: Path) -> None:
    base = made("llama, untied")
    tuned = extended(base)
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    peft.get_peft_model(tuned, config).save_pretrained(tmp_path, save_embedding_layers=False)
    refused(
        base,
        str(tmp_path),
        "(task 'a'): adds 5 rows to 'model.embed_tokens.weight', and has none of them for "
        "'lm_head.weight', which the model that it was trained with had; save the adapter again "
        "with save_embedding_layers=True",
    )
