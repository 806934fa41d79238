"""Fused models in memory against bundles and by hand; the searches for scales and weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fits import HEAD, TASKS, FewDigits, Fits, outputs, tiny_vit
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_net import TinyNet
from torch import Tensor, nn

import fusionkit
from fusionkit import TIES, Bundle, Elect, Family, Mean, Merge, Merged, TaskArithmetic, Weighted
from fusionkit.calibration.lorahub import Batches, LoraHub, evaluate, search_scale
from fusionkit.errors import CodecError, FusionKitError
from fusionkit.reuse.fused import Fused
from fusionkit.reuse.module import ReuseModule
from fusionkit.tasks.classification import Classification
from fusionkit.tasks.kinds import kinds_of
from fusionkit.tasks.task import Task

pytest_plugins = ["fits"]

MERGES = [
    Mean(),
    TaskArithmetic(0.7),
    TIES(0.4, 1.2),
    Elect(),
    Weighted({"parity": 0.5, "digit": -0.2, "rotation": 1.3, "unused": 9.0}),
]
FROZEN = ["patch_embed.*", "pos_embed", "blocks.0.norm*"]


def switched(source: Any, task: str, module: ReuseModule | None = None) -> dict[str, Tensor]:
    module = module or ReuseModule(tiny_vit())
    module.reuse(source)
    module.switch(task)
    return {name: tensor.clone() for name, tensor in module.model.state_dict().items()}


@pytest.mark.parametrize("merge", MERGES, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize(
    ("method", "adapters"),
    [
        ("lora", "modules"),
        ("lora", "merged"),
        ("linearized", "modules"),
        ("linearized", "merged"),
        ("ia3", "modules"),
        ("ia3", "merged"),
        ("full", "merged"),
    ],
)
def test_equals_the_bundle_of_the_merge(
    method: str, adapters: Any, merge: Merge, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    fits: Fits = request.getfixturevalue(method)
    frozen = FROZEN if method == "full" else []
    base = tiny_vit()
    family = Family(base, fits.paths, HEAD, frozen, adapters)
    fusionkit.compress(
        base,
        fits.paths,
        Merged(merge, "fp32"),
        tmp_path / "b",
        private=HEAD,
        frozen=frozen,
        adapters=adapters,
    )
    bundle = Bundle.load(tmp_path / "b", tiny_vit())
    assert bundle.codec == Merged(merge, "fp32")
    fused = Fused(family, merge)
    assert fused.tasks == TASKS
    start = base.state_dict()
    for task in TASKS:
        found, wanted = switched(fused, task), switched(bundle, task)
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.equal(found[name], tensor), name
        moved = {n for n in start if n not in {"head.weight", "head.bias"}}
        assert any(not torch.equal(found[n], start[n]) for n in moved)
        own = fits.modules[task].model.state_dict()
        saved = "base_model.model.head.modules_to_save.default.weight"
        head = own["head.weight"] if method == "full" else own[saved]
        assert torch.equal(found["head.weight"], head)


def test_after_any_other_source_and_task_the_same_bits(lora: Fits, full: Fits) -> None:
    base = tiny_vit()
    fused = Fused(Family(base, lora.paths, HEAD, adapters="modules"), Mean())
    other = Fused(Family(base, full.paths, HEAD, FROZEN), TaskArithmetic(1.0))
    module = ReuseModule(tiny_vit())
    wanted = switched(fused, "parity")
    for source, task in ((other, "digit"), (fused, "digit"), (fused, "rotation")):
        switched(source, task, module)
        found = switched(fused, "parity", module)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_exact_tensors_are_the_tasks_own_whatever_was_there() -> None:
    """A running statistic that one task moved and the next did not."""
    base = TinyNet().eval()
    ant, bee = ({n: t.clone() for n, t in base.state_dict().items()} for _ in range(2))
    ant["norm.num_batches_tracked"] += 7
    ant["norm.running_mean"] += 1
    ant["hidden.weight"] += 0.1
    family = Family(base, {"ant": ant, "bee": bee}, private=HEAD)
    module = ReuseModule(TinyNet().eval())
    module.model.load_state_dict(base.state_dict())
    module = ReuseModule(module.model)
    fused = Fused(family, Mean())
    module.reuse(fused)
    for task, own in (("ant", ant), ("bee", bee), ("ant", ant)):
        module.switch(task)
        state = module.model.state_dict()
        for name in ("norm.num_batches_tracked", "norm.running_mean"):
            assert torch.equal(state[name], own[name]), (task, name)
        torch.testing.assert_close(state["hidden.weight"], base.hidden.weight + 0.05)


class TestLinearity:
    """Fusing linearized adapters fuses functions, layer by layer (2310.04742)."""

    LAYERS = ("blocks.0.attn.qkv", "blocks.3.mlp.fc1")

    def gap(self, fits: Fits, weights: list[float], seed: int) -> float:
        """How far the fused layers are from f₀ + Σ w_t (f_t − f₀), f_t as trained by PEFT."""
        base = tiny_vit()
        family = Family(base, fits.paths, HEAD, adapters="modules")
        merge = Weighted(dict(zip(TASKS, weights, strict=True)))
        state = switched(Fused(family, merge), "digit")
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(seed))
        gaps = []
        with torch.no_grad():
            for name in self.LAYERS:
                layer: Any = base.get_submodule(name)
                start = layer(x)
                moved = [
                    fits.modules[task].model.get_submodule(f"base_model.model.{name}")(x) - start
                    for task in TASKS
                ]
                wanted = start + sum(w * m for w, m in zip(weights, moved, strict=True))
                found = nn.functional.linear(x, state[f"{name}.weight"], layer.bias)
                gaps.append(float((found - wanted).abs().max()))
        return max(gaps)

    def test_linearized(self, linearized: Fits) -> None:
        @settings(max_examples=12, deadline=None, database=None)
        @given(st.lists(st.floats(-2, 2, width=32), min_size=3, max_size=3), st.integers(0, 9))
        def check(weights: list[float], seed: int) -> None:
            assert self.gap(linearized, weights, seed) < 1e-4

        check()

    def test_a_lora_is_not_linear(self, lora: Fits) -> None:
        assert self.gap(lora, [1 / 3] * 3, 0) > 1e-2


class TestWeighted:
    def test_by_hand(self) -> None:
        base = {"w": torch.zeros(2, 2), "b": torch.zeros(2)}
        ant = {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor([1.0, -1.0])}
        bee = {"w": torch.tensor([[0.0, 1.0], [-1.0, 0.5]]), "b": torch.tensor([4.0, 0.0])}
        for finetuned in ({"ant": ant, "bee": bee}, {"bee": bee, "ant": ant}):  # by name
            family = Family(base, finetuned)
            vectors = Fused(family, Weighted({"bee": 2.0, "ant": -0.5})).vectors
            wanted = torch.tensor([[-0.5, 1.0], [-3.5, -1.0]])
            torch.testing.assert_close(vectors["w"], wanted)
            torch.testing.assert_close(vectors["b"], torch.tensor([7.5, 0.5]))

    def test_a_task_without_a_weight(self) -> None:
        family = Family({"w": torch.zeros(2)}, {"ant": {"w": torch.ones(2)}})
        with pytest.raises(CodecError, match=r"no weight of task 'ant'"):
            Fused(family, Weighted({"bee": 1.0}))

    @given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=5), st.integers(0, 99))
    def test_mean_and_sum_are_special_cases(self, values: list[float], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        finetuned = {
            str(n): {"w": torch.randn(3, 4, generator=generator)} for n in range(len(values))
        }
        family = Family({"w": torch.randn(3, 4, generator=generator)}, finetuned)
        for weight, merge in ((1 / len(values), Mean()), (0.3, TaskArithmetic(0.3))):
            found = Fused(family, Weighted(dict.fromkeys(finetuned, weight))).vectors["w"]
            torch.testing.assert_close(found, Fused(family, merge).vectors["w"])


class Counted(nn.Linear):
    """A linear classifier that counts its calls."""

    def __init__(self) -> None:
        super().__init__(4, 2, bias=False)
        nn.init.zeros_(self.weight)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def separable(
    good: float = 1.0, harm: float = 1.0
) -> tuple[ReuseModule, Family, Batches, dict[str, Task]]:
    """Two tasks told by the sign of their own feature; 'bad' learned the wrong sign of its own."""
    model = Counted()
    tau = torch.zeros(2, 4)
    tau[0, 0], tau[1, 0] = good, -good
    wrong = torch.zeros(2, 4)
    wrong[0, 1], wrong[1, 1] = -harm, harm
    base = {"weight": torch.zeros(2, 4)}
    family = Family(base, {"good": {"weight": tau}, "bad": {"weight": wrong}})
    generator = torch.Generator().manual_seed(0)
    batches = {}
    for place, task in enumerate(("good", "bad")):
        x = torch.zeros(64, 4)
        x[:, place] = torch.randn(64, generator=generator)
        batches[task] = [(x, (x[:, place] < 0).long())]
    return ReuseModule(model), family, batches, dict.fromkeys(batches, Classification(2))


def loss_by_hand(weights: dict[str, float], good: float = 1.0, harm: float = 1.0) -> float:
    """Mean cross-entropy of the separable case."""
    _, _, batches, _ = separable()
    total = 0.0
    for place, (task, strength) in enumerate((("good", good), ("bad", -harm))):
        ((x, labels),) = batches[task]
        margin = weights[task] * strength * x[:, place]
        logits = torch.stack([margin, -margin], 1)
        total += float(nn.functional.cross_entropy(logits, labels)) / 2
    return total


class TestEvaluate:
    def test_by_hand(self, lora: Fits) -> None:
        module = ReuseModule(tiny_vit())
        fused = Fused(Family(tiny_vit(), lora.paths, HEAD, adapters="modules"), Mean())
        data = FewDigits()
        loaders = dict(zip(TASKS, data.val_dataloader(), strict=True))
        chosen = {task: list(loaders[task]) for task in ("parity", "digit")}
        module.train()
        loss, score = evaluate(module, fused, chosen, kinds_of(data, list(chosen)))
        assert module.training
        losses, scores = [], []
        for task, batches in chosen.items():
            model = tiny_vit()
            state = switched(fused, task)
            model.head = nn.Linear(64, data.num_classes[task])
            model.load_state_dict(state)
            x, y = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
            with torch.no_grad():
                logits = model.eval()(x)
            losses.append(float(nn.functional.cross_entropy(logits, y)))
            scores.append(float((logits.argmax(1) == y).float().mean()))
        assert loss == pytest.approx(np.mean(losses), rel=1e-5)
        assert score == pytest.approx(np.mean(scores))
        assert outputs(module.model, "digit").shape[1] == 10


class TestSearchScale:
    def test_of_equal_scores_the_lower_loss(self) -> None:
        """Accuracy is 1 for 'good' and 0 for 'bad' at any scale: the loss decides."""
        module, family, batches, kinds = separable(good=2.0, harm=1.0)
        scales = [0.1, 0.4, 0.2, 1.5, 3.0]
        losses = {s: loss_by_hand({"good": s, "bad": s}, 2.0, 1.0) for s in scales}
        best = min(scales, key=losses.__getitem__)
        assert best not in {scales[0], scales[-1]}
        found = search_scale(module, family, TaskArithmetic(9.0), scales, batches, kinds)
        assert found == TaskArithmetic(best)

    def test_the_best_score(self) -> None:
        """Only one of the scales turns the base's answer without overshooting."""
        base = {"weight": torch.tensor([[0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])}
        moved = {"weight": base["weight"].clone()}
        moved["weight"][1, 0] = 1.0  # class 1 where x0 · λ · 2 > x3
        family = Family(base, {"a": moved, "b": moved})
        x = torch.tensor([[1.0, 0, 0, 1.0], [0.3, 0, 0, 1.0]])  # to be 1, to be 0
        batches = {"a": [(x, torch.tensor([1, 0]))]}
        kinds = {"a": Classification(2)}
        model = Counted()
        model.load_state_dict(base)
        module = ReuseModule(model)
        for scales in ([0.2, 1.0, 4.0], [4.0, 1.0, 0.2]):  # 2λ must be in (1, 3.33)
            found = search_scale(module, family, TaskArithmetic(), scales, batches, kinds)
            assert found == TaskArithmetic(1.0)
            ties = search_scale(module, family, TIES(1.0, aggregate="sum"), scales, batches, kinds)
            assert ties == TIES(1.0, 1.0, "sum")

    def test_settings_other_than_the_scale_stay(self) -> None:
        module, family, batches, kinds = separable()
        found = search_scale(module, family, TIES(0.5, 7.0, "sum"), [0.25], batches, kinds)
        assert found == TIES(0.5, 0.25, "sum")

    @pytest.mark.parametrize("merge", [Mean(), Elect()])
    def test_merges_without_a_scale_come_back(self, merge: Merge) -> None:
        module, family, batches, kinds = separable()
        assert search_scale(module, family, merge, [0.1], batches, kinds) is merge

    def test_no_scales_nothing_to_search(self) -> None:
        module, family, batches, kinds = separable()
        assert search_scale(
            module, family, TaskArithmetic(0.4), [], batches, kinds
        ) == TaskArithmetic(0.4)


class TestLoraHub:
    def objective(self, hub: LoraHub, merge: Weighted) -> float:
        magnitude = sum(abs(w) for w in merge.weights.values()) / 2
        return loss_by_hand(merge.weights) + hub.penalty * magnitude

    @pytest.mark.parametrize("evaluations", [2, 3, 4, 5, 6, 7, 8, 13, 40])
    def test_no_more_evaluations_than_asked_for(self, evaluations: int) -> None:
        module, family, batches, kinds = separable()
        LoraHub(evaluations).search(module, family, batches, kinds)
        assert module.model.calls == 2 * evaluations  # one batch of each of two tasks

    @settings(max_examples=10, deadline=None)
    @given(evaluations=st.integers(2, 30), bound=st.floats(0.5, 4.0), seed=st.integers(0, 2**31))
    def test_in_bounds_and_never_worse_than_the_mean(
        self, evaluations: int, bound: float, seed: int
    ) -> None:
        module, family, batches, kinds = separable()
        hub = LoraHub(evaluations, bound, seed=seed)
        found = hub.search(module, family, batches, kinds)
        assert list(found.weights) == ["good", "bad"]
        assert all(abs(weight) <= bound for weight in found.weights.values())
        mean = Weighted({"good": 0.5, "bad": 0.5})
        assert self.objective(hub, found) <= self.objective(hub, mean) + 1e-6

    def test_by_the_seed(self) -> None:
        found = []
        for seed in (0, 0, 1):
            np.random.seed(len(found))  # noqa: NPY002 (the optimiser's own generator)
            found.append(LoraHub(12, seed=seed).search(*separable()))
        assert found[0] == found[1] != found[2]

    def test_leaves_the_global_generator_alone(self) -> None:
        np.random.seed(3)  # noqa: NPY002
        wanted = np.random.rand()  # noqa: NPY002
        np.random.seed(3)  # noqa: NPY002
        LoraHub(6).search(*separable())
        assert np.random.rand() == wanted  # noqa: NPY002

    def test_finds_whom_to_trust(self) -> None:
        module, family, batches, kinds = separable()
        hub = LoraHub(120, bound=1.5, penalty=0.0)
        found = hub.search(module, family, batches, kinds)
        assert found.weights["good"] > 1.2
        assert found.weights["bad"] < -1.2
        assert evaluate(module, Fused(family, found), batches, kinds)[1] == 1.0

    def test_the_penalty_shrinks(self) -> None:
        module, family, batches, kinds = separable()
        found = LoraHub(120, penalty=10.0).search(module, family, batches, kinds)
        assert max(abs(weight) for weight in found.weights.values()) < 0.1

    @pytest.mark.nightly
    def test_stays_sound_long_after_it_has_converged(self) -> None:
        module, family, batches, kinds = separable()
        hub = LoraHub(1500)
        found = hub.search(module, family, batches, kinds)
        assert self.objective(hub, found) < self.objective(
            hub, Weighted({"good": 1.4, "bad": -1.4})
        )

    def test_refusals(self) -> None:
        module, family, batches, kinds = separable()
        with pytest.raises(FusionKitError, match="1 evaluations"):
            LoraHub(1).search(module, family, batches, kinds)
        one = Family(family.base, {"good": {"weight": torch.ones(2, 4)}})
        with pytest.raises(FusionKitError, match="1 tasks"):
            LoraHub().search(module, one, batches, kinds)
        for bound in (0.2, 0.0, -1.0):
            with pytest.raises(FusionKitError, match=r"bound.*0\.5"):
                LoraHub(bound=bound).search(module, family, batches, kinds)
