"""Sharded models: the same bits as in one process, on gloo and CPUs; what can't be is refused."""

import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from peft_adapters import CONFIGS, net, saved
from processes import together
from safetensors.torch import save_file
from spread_data import Data
from tiny_net import TASKS, TinyNet, perturbed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import fusionkit
from fusionkit import DBMS, EMR, SVD, Bundle, Calibration, Dense, MagnitudePrune
from fusionkit.calibration.dbms import DBMSCalibration
from fusionkit.errors import BundleError, FusionKitError
from fusionkit.reuse import sharded
from fusionkit.reuse.module import ReuseModule
from fusionkit.reuse.sharded import ShardedBase
from fusionkit.tasks.spread import TasksSpread

PRIVATE = ["head.*"]
CODECS = {"emr": EMR(), "svd": SVD(rank=2), "prune": MagnitudePrune(0.3), "dense": Dense("bf16")}
WIDTH = 7  # a number of rows that neither 2 nor 3 ranks can share out evenly
SPREAD = {"ant": 13, "bee": 29, "cat": 1}
Shard = Callable[[ReuseModule], ReuseModule]


class Block(nn.Module):
    """Two dtypes, a vector of one row, and a scalar."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide = nn.Linear(width, width)
        self.narrow = nn.Linear(width, width, dtype=torch.bfloat16)
        self.gain = nn.Parameter(torch.ones(1))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.gain * self.wide(x).relu() + self.narrow(x.bfloat16()).float()


class Net(nn.Module):
    """Blocks, of which the last two share a layer; tied embeddings, BatchNorm, and a head."""

    def __init__(self, classes: int = 3, width: int = WIDTH) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(4))
        self.blocks[3].wide = self.blocks[2].wide
        self.norm = nn.BatchNorm1d(width)
        self.decoder = nn.Linear(width, 11, bias=False)
        self.decoder.weight = self.embed.weight
        self.head = nn.Linear(11, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens).mean(1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.decoder(self.norm(x)))  # type: ignore[no-any-return]


def base_net(width: int = WIDTH) -> Net:
    torch.manual_seed(0)
    return Net(width=width).eval()


def tuned(base: nn.Module, seed: int, classes: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    own = {"head.weight": torch.Size((classes, 11)), "head.bias": torch.Size((classes,))}
    state = {}
    for name, tensor in base.state_dict().items():
        noise = torch.randn(own.get(name, tensor.shape), generator=generator)
        state[name] = noise if name in own else (tensor + 0.1 * noise).to(tensor.dtype)
    state["decoder.weight"] = state["embed.weight"]
    for leaf in ("weight", "bias"):
        state[f"blocks.3.wide.{leaf}"] = state[f"blocks.2.wide.{leaf}"]
    return state


def prepare(folder: Path) -> None:
    """The bundles and checkpoints that every rank opens."""
    base = base_net()
    finetuned: Any = {task: tuned(base, seed, seed + 2) for seed, task in enumerate(TASKS)}
    for name, codec in CODECS.items():
        fusionkit.compress(base, finetuned, codec, folder / name, private=PRIVATE)
    tied = {"decoder.weight", "blocks.3.wide.weight", "blocks.3.wide.bias"}
    for name, state in {"base": base.state_dict(), **finetuned}.items():
        untied = {key: tensor.clone() for key, tensor in state.items() if key not in tied}
        save_file(untied, folder / f"{name}.safetensors")
    fusionkit.compress(base, finetuned, Dense(), folder / "damaged", private=PRIVATE)
    path = folder / "damaged" / "task-bee.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    for place, task in enumerate(("lora", "more")):
        saved(folder / task, CONFIGS["rslora"], place)
    for place, task in enumerate(("ia3", "also")):
        saved(folder / task, CONFIGS["ia3"], place)
    wide = base_net(width=256)
    save_file({k: v.clone() for k, v in wide.state_dict().items()}, folder / "wide.safetensors")


def visits(module: ReuseModule, tasks: tuple[str | None, ...] = (*TASKS, "ant", None)) -> Any:
    """Weights and outputs of every task and of the base."""
    tokens = torch.randint(0, 11, (5, 4), generator=torch.Generator().manual_seed(0))
    found = []
    for task in tasks:
        module.switch(task)
        found.append({**state_of(module), "(outputs)": module(tokens)})
    return found


def state_of(module: ReuseModule) -> dict[str, Tensor]:
    with torch.inference_mode(False), torch.no_grad():
        state = module.model.state_dict().items()
        return {name: t.full_tensor() if isinstance(t, DTensor) else t.clone() for name, t in state}


def bundled(folder: Path, shard: Shard) -> Any:
    return {n: visits(shard(ReuseModule(base_net(), bundle=folder / n))) for n in CODECS}


def in_inference_mode(folder: Path, shard: Shard) -> Any:
    """As the Trainer evaluates on GPUs; on CPUs it takes `no_grad` instead."""
    module = shard(ReuseModule(base_net(), bundle=folder / "emr"))
    with torch.inference_mode():
        return [{n: t.clone() for n, t in found.items()} for found in visits(module)]


def uncompressed(folder: Path, shard: Shard) -> Any:
    finetuned: Any = {task: str(folder / f"{task}.safetensors") for task in TASKS}
    module = ReuseModule(base_net(), finetuned=finetuned, private=PRIVATE)
    assert module.tasks == TASKS  # opened before it is sharded
    late = ReuseModule(base_net(), finetuned=finetuned, private=PRIVATE, codec=EMR())
    return visits(shard(module)), visits(shard(late))


def adapters(folder: Path, shard: Shard) -> Any:
    lora: Any = {task: str(folder / task) for task in ("lora", "more")}
    ia3: Any = {task: str(folder / task) for task in ("ia3", "also")}
    modules = (
        ReuseModule(net(), finetuned=lora),
        ReuseModule(net(), finetuned=ia3, adapters="modules", codec=EMR()),
    )
    assert modules[1].tasks
    return [visits(shard(module), (*module.tasks, None)) for module in modules]


def from_meta(folder: Path, shard: Shard) -> Any:
    with torch.device("meta" if shard is not whole else "cpu"):
        model = Net().eval()
    base = str(folder / "base.safetensors")
    module = shard(ReuseModule(model, base=base, bundle=folder / "emr", private=PRIVATE))
    assert model.decoder.weight is model.embed.weight
    return visits(module, TASKS)  # the base's own head is the task's last, or zero


def cached(folder: Path, shard: Shard) -> Any:
    module = shard(ReuseModule(base_net(), bundle=folder / "svd", cache_bytes=10**6))
    found = visits(module, ("ant", "bee"))
    source = module.source
    assert isinstance(source, Bundle)
    source.tensor = None  # type: ignore[method-assign, assignment]
    return [*found, *visits(module, ("ant", None, "bee"))]


def small_cache(folder: Path, shard: Shard) -> Any:
    """Room for one task by the largest parts of any rank, and for more by the smallest."""
    module = shard(ReuseModule(base_net(), bundle=folder / "svd", cache_bytes=1000))
    found = visits(module, ("ant", "bee", "ant"))
    assert list(module._switcher.cached) == ([] if shard is whole else ["ant"])
    return found


def in_half(folder: Path, shard: Shard) -> Any:
    module = shard(ReuseModule(base_net(), bundle=folder / "emr"))
    for block in module.model.blocks:
        block.wide.half()
    module._switcher.forget()
    found = []
    for task in (*TASKS, None):
        module.switch(task)
        found.append(state_of(module))
    return found


def while_active(folder: Path, shard: Shard) -> Any:
    module = ReuseModule(base_net(), bundle=folder / "dense")
    module.switch("cat")
    shard(module)
    assert module.task is None or shard is whole
    return visits(module)


def sharded_before(folder: Path, shard: Shard) -> Any:
    model = base_net()
    if shard is not whole:
        ignored = own(model.requires_grad_(False))
        for module in (*model.blocks[:2], model):
            fully_shard(module, ignored_params=ignored)
    return visits(ReuseModule(model, bundle=folder / "prune"))


def sharded_between(folder: Path, shard: Shard) -> Any:
    module = ReuseModule(base_net(), bundle=folder / "prune")
    if shard is not whole:
        model = module.model.requires_grad_(False)
        fully_shard(model, ignored_params=own(model))
    return visits(shard(module))


def own(model: nn.Module) -> set[nn.Parameter]:
    return {p for name, p in model.named_parameters() if not p.ndim or name.startswith("head")}


def failed(folder: Path, shard: Shard) -> Any:
    module = shard(ReuseModule(base_net(), bundle=folder / "damaged"))
    module.switch("ant")
    with pytest.raises(BundleError, match=r"task-bee.safetensors: part '.*' is not what was"):
        module.switch("bee")
    return state_of(module), visits(module, ("cat",))


def looked_at(folder: Path, shard: Shard) -> Any:
    """What is asked for, and not written, stays as it was."""
    module = shard(ReuseModule(base_net()))
    with sharded.whole(dict(module.model.state_dict())) as targets:
        assert all(not isinstance(targets[name], DTensor) for name in targets)
    return state_of(module)


SAME = (
    looked_at,
    bundled,
    in_inference_mode,
    uncompressed,
    adapters,
    from_meta,
    cached,
    small_cache,
    in_half,
    while_active,
    sharded_before,
    sharded_between,
    failed,
)


def whole(module: ReuseModule) -> ReuseModule:
    return module


def live() -> int:
    """Bytes of all tensors that anything refers to for longer than a moment.

    One of gloo's threads lets go of a tensor that it gathered only some time after it says that
    this is done: the least of several looks is what stays.
    """
    looks = []
    for _ in range(10):
        looks.append(seen())
        time.sleep(0.05)
    return min(looks)


def seen() -> int:
    """Bytes of all tensors that anything refers to now."""
    gc.collect()
    storages = {}
    for each in gc.get_objects():
        if issubclass(type(each), Tensor) and not each.is_meta:
            storage = (each.to_local() if isinstance(each, DTensor) else each).untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def held(folder: Path, shard: Shard, meta: bool) -> int:
    """Bytes that stay on a rank after it has switched back and forth."""
    gc.collect()
    gc.freeze()  # what is there now is looked at no more: all that was imported, above all
    before = live()
    with torch.device("meta" if meta else "cpu"):
        model = Net(width=256).eval()
    base = {"base": str(folder / "wide.safetensors")} if meta else {}
    finetuned: Any = {"far": str(folder / "wide.safetensors")}
    module = shard(ReuseModule(model, finetuned=finetuned, private=PRIVATE, **base))
    assert isinstance(module.base_weights, ShardedBase)
    for task in ("far", None, "far"):
        module.switch(task)
        with torch.no_grad():
            module(torch.zeros((2, 3), dtype=torch.long))
    return live() - before


def refusals(folder: Path, shard: Shard) -> list[str]:
    base = str(folder / "base.safetensors")
    with torch.device("meta"):
        empty, unsaved, early = Net(), Net(), Net()
    unsaved.register_buffer("turns", torch.zeros(3, device="meta"), persistent=False)
    fully_shard(early.requires_grad_(False), ignored_params=own(early))
    attempts: list[Callable[[], Any]] = [
        lambda: ReuseModule(empty),
        lambda: ReuseModule(empty, base=base, private=PRIVATE).switch(None),
        lambda: shard(ReuseModule(unsaved, base=base, private=PRIVATE)),
        lambda: shard(ReuseModule(early, base=base, private=PRIVATE)),
        lambda: unforeseen_head(folder, shard),
    ]
    found = []
    for attempt in attempts:
        with pytest.raises(FusionKitError) as error:
            attempt()
        found.append(str(error.value))
    return found


def unforeseen_head(folder: Path, shard: Shard) -> None:
    """A module that is sharded before it knows of the bundle, and of its heads."""
    module = shard(ReuseModule(base_net()))
    module.reuse(Bundle(folder / "emr"))
    module.switch("bee")  # of the model's own shape
    assert torch.equal(state_of(module)["head.bias"], bundle_head(folder, "bee"))
    module.switch("cat")


def bundle_head(folder: Path, task: str) -> Tensor:
    return dict(Bundle(folder / "emr").private_tensors(task))["head.bias"]


def on_rank(rank: int, ranks: int, folder: Path) -> None:
    """What one of several processes does."""
    store = f"file://{folder / f'store{ranks}'}"
    torch.distributed.init_process_group("gloo", store, rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))

    def shard(module: ReuseModule) -> ReuseModule:
        module.shard(mesh)
        return module

    found: dict[str, Any] = {case.__name__: case(folder, shard) for case in SAME}
    found["held"] = [held(folder, shard, meta) for meta in (False, True)]
    found["refusals"] = refusals(folder, shard)
    torch.save(found, folder / f"rank{rank}of{ranks}.pt")
    torch.distributed.destroy_process_group()


class OnCPU(FSDPStrategy):
    """Lightning itself refuses the class, by its very type, where there is no GPU."""


def evaluated(strategy: Any, devices: int, meta: bool = False, tasks: bool = False) -> Any:
    """Scores of a validation and of a test, of one module."""
    torch.manual_seed(0)
    base = TinyNet().eval()
    data: Any = Data(SPREAD)
    finetuned: Any = {t: perturbed(base, seed=p, classes=p + 2) for p, t in enumerate(TASKS)}
    bundle = fusionkit.compress(base.state_dict(), finetuned, EMR(), private=PRIVATE)
    source = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with torch.device("meta" if meta else "cpu"):
        model = TinyNet().eval()
    base_of: Any = fusionkit.Checkpoint.of(source)
    module = ReuseModule(model, bundle=bundle, base=base_of, private=PRIVATE)
    found = []
    for verb in ("validate", "test"):
        trainer = quiet_trainer(strategy(), devices)
        datamodule = TasksSpread(data) if tasks else data
        getattr(trainer, verb)(module, datamodule=datamodule, verbose=False)
        assert module.scores is not None
        found.append(module.scores.values)
        assert isinstance(module.base_weights, ShardedBase) == (devices > 1)
    return found


def calibration() -> DBMSCalibration:
    codec = DBMS(EMR())
    return DBMSCalibration(ReuseModule(TinyNet(), codec=codec), Calibration(), codec)


def quiet_trainer(strategy: Any, devices: int) -> Trainer:
    quiet: Any = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(accelerator="cpu", devices=devices, strategy=strategy, **quiet)


def over_data() -> ModelParallelStrategy:
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)


def with_trainer(rank: int, ranks: int, out: Path) -> None:
    """What the Trainer does over two processes."""
    found: dict[str, Any] = {
        "scores": evaluated(over_data, 2),
        "from meta": evaluated(over_data, 2, meta=True),
    }
    refused: dict[str, Callable[[], Any]] = {
        "tasks": lambda: evaluated(over_data, 2, tasks=True),
        "tensors": lambda: evaluated(ModelParallelStrategy, 2),
        "flat": lambda: evaluated(OnCPU, 2),
        "copies": lambda: evaluated(lambda: "ddp", 2, meta=True),
        "fit": lambda: quiet_trainer(over_data(), 2).fit(calibration(), [(0, 0)]),
    }
    for name, attempt in refused.items():
        with pytest.raises((FusionKitError, NotImplementedError)) as error:
            attempt()
        # Lightning's teardown then fails to move what is on the meta device.
        cause = error.value if isinstance(error.value, FusionKitError) else error.value.__context__
        found[name] = str(cause)
    if not rank:
        out.write_text(json.dumps(found))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    prepare(folder)
    return folder


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(2, marks=pytest.mark.slow),
        pytest.param(3, marks=[pytest.mark.slow, pytest.mark.nightly]),
    ],
)
def ranks(request: pytest.FixtureRequest, folder: Path) -> list[dict[str, Any]]:
    """What each rank found, of two and of three."""
    count: int = request.param
    together(count, on_rank, folder)
    return [torch.load(folder / f"rank{rank}of{count}.pt") for rank in range(count)]


@pytest.mark.parametrize("case", SAME, ids=lambda case: case.__name__)
def test_every_rank_finds_the_bits_of_one_process(
    case: Any, ranks: list[dict[str, Any]], folder: Path
) -> None:
    wanted = case(folder, whole)
    for found in ranks:
        torch.testing.assert_close(found[case.__name__], wanted, rtol=0, atol=0)


def test_a_rank_keeps_its_share_of_model_and_base(
    ranks: list[dict[str, Any]], folder: Path
) -> None:
    size = sum(tensor.nbytes for tensor in Net(width=256).parameters())
    for found in ranks:
        for held_here in found["held"]:
            # Beyond it: heads and buffers; both ways of rounding a row up.
            assert held_here < 2 * size / len(ranks) * 1.05


def test_what_can_not_be_sharded_or_switched_is_refused(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        bare, unfilled, unsaved, early, unforeseen = found["refusals"]
        assert "the model is on the meta device; give `base`" in bare
        assert "can't be switched; first call `ReuseModule.shard`" in unfilled
        assert "'turns' of Net is on the meta device, and no checkpoint holds it" in unsaved
        assert "was sharded on the meta device" in early
        assert "private tensor 'head.bias' has another shape than the model's" in unforeseen


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("sharded") / "scores.json"
    together(2, with_trainer, out)
    return json.loads(out.read_text())


def test_the_trainers_scores_are_those_of_one_process(trained: Any) -> None:
    """Rows that two ranks can't share evenly, down to a single one."""
    wanted = evaluated(lambda: "auto", 1)
    assert trained["scores"] == wanted
    assert trained["from meta"] == wanted


def test_the_trainer_is_told_before_anything_runs(trained: Any) -> None:
    assert "use --spread rows" in trained["tasks"]
    assert "set data_parallel_size: (all devices) and tensor_parallel_size: 1" in trained["tensors"]
    assert "use ModelParallelStrategy" in trained["flat"]
    assert "only with ModelParallelStrategy is it filled" in trained["copies"]
    assert "can be switched and evaluated, but not calibrated" in trained["fit"]
