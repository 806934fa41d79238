"""Batches of many tasks on every kind of layer: each row as its task by itself."""

import copy
from typing import Any

import pytest
import torch
import transformers
import vocabularies
from mixed_rows import bundled, call, check, tuned
from torch import Tensor, nn

from fusionkit import SVD, Dense
from fusionkit.errors import FusionKitError
from fusionkit.reuse.mixed_batch import MixedBatch

ROWS = ["cat", None, "ant", "ant", "bee", None, "cat"]


class Scale(nn.Module):
    """An RMS norm as models have it: of no class that is known."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Layers(nn.Module):
    """Raw parameters, attention, norms, convolutions, a parametrised layer, a recurrent one."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 2, stride=2)
        self.mix = nn.Conv2d(8, 8, 1)
        self.batch_norm = nn.BatchNorm2d(8)
        self.first = nn.Parameter(torch.randn(1, 1, 8))
        self.places = nn.Parameter(torch.randn(1, 5, 8))
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.scale = Scale(8)
        self.recurrent = nn.GRU(8, 8, batch_first=True)
        self.weighted = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.out = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.batch_norm(self.mix(self.patch(images))).flatten(2).mT
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1) + self.places
        x = x + self.attention(y := self.norm(x), y, y, need_weights=False)[0]
        x = self.recurrent(self.scale(x))[0]
        windows = self.weighted(x.reshape(-1, 8)).view(x.shape)  # (rows · 5, 8)
        return self.out(self.block(windows).mean(1))


class Image(nn.Module):
    """A convolution at the end: what the base's product is added to is no matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv1d(3, 6, 3, padding=1)
        self.thin = nn.Conv1d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.thin(self.wide(x).relu()).flatten(1)


def images(rows: int) -> Tensor:
    return torch.randn(rows, 3, 4, 4)


@pytest.mark.parametrize("codec", [Dense("fp32"), SVD(rank=2, dtype="fp32")], ids=str)
@pytest.mark.parametrize("tasks", [ROWS, ["ant", "bee"], ["ant"] * 3, ["ant"]], ids=len)
def test_layers_of_every_kind(codec: Any, tasks: list[str | None]) -> None:
    base = Layers().eval()
    check(base, bundled(base, tuned(base), codec), tasks, images(len(tasks)))


@pytest.mark.parametrize(
    "names", [("first",), ("weighted",), ("attention", "block.self"), ("out",)]
)
def test_layers_by_themselves(names: tuple[str, ...]) -> None:
    base = Layers().eval()
    states = tuned(base, still=lambda name: not name.startswith(names))
    check(base, bundled(base, states, Dense("fp32")), ROWS, images(7))


def test_convolutions() -> None:
    base = Image().eval()
    check(base, bundled(base, tuned(base), SVD(rank=1)), ROWS, torch.randn(7, 3, 5))


@pytest.mark.parametrize("kind", [kind for kind in vocabularies.MODELS if kind != "bart"])
@pytest.mark.parametrize("codec", [Dense("fp32"), SVD(rank=2, dtype="fp32")], ids=["dense", "svd"])
def test_language_models_whose_vocabulary_grew(kind: str, codec: Any) -> None:
    base = vocabularies.made(kind)
    more = {"ant": (5, 1), "bee": (0, 2), "cat": (3, 3)}
    states = {
        task: dict(vocabularies.extended(base, *each).state_dict()) if each[0] else None
        for task, each in more.items()
    }
    states["bee"] = tuned(base, ["bee"], 0.05)["bee"]
    bundle = bundled(base, states, codec)
    ids = torch.randint(0, vocabularies.ROWS, (7, 6))
    for row, task in enumerate(ROWS):
        ids[row, 2] = vocabularies.ROWS - 1 + (more[task][0] if task else 0)

    def run(model: nn.Module, inputs: Tensor) -> Tensor:
        if model.config.is_encoder_decoder:  # type: ignore[union-attr]
            given = {"input_ids": inputs, "decoder_input_ids": inputs, "use_cache": False}
            return model(**given).logits  # type: ignore[no-any-return]
        return call(model, inputs)

    check(base, bundle, ROWS, ids, run)


def tiny(kind: str, **settings: Any) -> Any:
    config = transformers.AutoConfig.for_model(kind, **settings)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("mixtral", {"num_local_experts": 4}),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}),
        ("gemma3_text", {}),
    ],
)
@pytest.mark.parametrize("codec", [Dense("fp32"), SVD(rank=2, dtype="fp32")], ids=["dense", "svd"])
def test_experts_and_scaled_embeddings(kind: str, own: dict[str, Any], codec: Any) -> None:
    base = tiny(kind, **SIZES, **own)
    bundle = bundled(base, tuned(base, scale=0.02), codec)
    check(base, bundle, ROWS, torch.randint(1, 40, (7, 6)))


class Routed(nn.Module):
    """Experts in a list, each given the tokens that are sent to it."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 4)
        out = torch.zeros_like(flat)
        sent = flat[:, 0] > 0
        for expert, mine in zip(self.experts, (sent, ~sent), strict=True):
            out[mine] = expert(flat[mine])
        return out.view(x.shape)


def test_experts_in_a_list_are_given_their_tokens() -> None:
    base = nn.Sequential(nn.Linear(4, 4), Routed()).eval()
    check(base, bundled(base, tuned(base, scale=0.5), SVD(rank=1)), ROWS, torch.randn(7, 6, 4))


def test_generation_step_by_step_is_each_tasks_own() -> None:
    base = vocabularies.made("llama, tied")
    bundle = bundled(base, tuned(base, scale=0.3), SVD(rank=2))
    ids = torch.randint(1, 40, (7, 4))

    def generated(model: nn.Module, inputs: Tensor) -> Tensor:
        mask = torch.ones_like(inputs)
        found = model.generate(  # type: ignore[operator]
            inputs, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None
        )
        return found.double()  # type: ignore[no-any-return]

    batch = MixedBatch(copy.deepcopy(base), bundle)
    found = check(base, bundle, ROWS, ids, generated, batch=batch)
    assert len({tuple(row[4:].tolist()) for row in found}) > 2


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet10t"])
def test_models_of_timm(name: str) -> None:
    timm = pytest.importorskip("timm")
    small = {"img_size": 32, "depth": 2, "embed_dim": 16, "num_heads": 2}
    torch.manual_seed(0)
    base = timm.create_model(name, num_classes=4, **(small if "vit" in name else {})).eval()
    head = "head.*" if "vit" in name else "fc.*"
    bundle = bundled(base, tuned(base, scale=0.05), SVD(rank=2), private=[head])
    check(base, bundle, ROWS, torch.randn(7, 3, 32, 32), tolerance=5e-5)


def head(hidden: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, classes))


def test_heads_of_several_layers_and_sizes() -> None:
    class Net(nn.Module):
        def __init__(self, hidden: int, classes: int) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), head(hidden, classes)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x))  # type: ignore[no-any-return]

    base = Net(6, 3).eval()
    states = {
        task: {**dict(Net(*sizes).state_dict()), **dict(base.body.state_dict(prefix="body."))}
        for task, sizes in {"ant": (2, 5), "bee": (9, 2), "cat": (6, 3)}.items()
    }
    bundle = bundled(base, states, Dense(), private=["head.*"])
    check(base, bundle, ROWS, torch.randn(7, 4))
    batch = MixedBatch(base, bundle)
    assert [batch.classes(task) for task in (None, "ant", "bee", "cat")] == [3, 5, 2, 3]


def test_what_can_not_be_told_apart_by_row_is_refused() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.weight).sum()

    base = Whole().eval()
    batch = MixedBatch(base, bundled(base, tuned(base), Dense()))
    with (
        batch.rows(["ant", "bee"]),
        pytest.raises(FusionKitError, match=r"'Whole' is run task by task, .* results of shape"),
    ):
        base(torch.randn(2, 4))
    with (
        batch.rows(["ant", "bee"]),
        pytest.raises(FusionKitError, match=r"has a tensor of shape \[3, 4\] in a batch of 2 rows"),
    ):
        base(torch.randn(3, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_half_precision(dtype: torch.dtype) -> None:
    """A product beside a rounded weight is nearer to the task than their rounded sum."""
    base = tiny("llama", **SIZES).to(dtype)
    bundle = bundled(base, tuned(base, scale=0.02), SVD(rank=2))
    ids = torch.randint(1, 40, (7, 6))
    bound = {torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype]
    check(base, bundle, ROWS, ids, tolerance=bound)
