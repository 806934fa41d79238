"""`fusionkit fuse`: rows by hand, plots, and going on after every kind of interruption."""

import csv
import json
import math
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fits import HEAD, FewDigits, tiny_vit
from lightning.pytorch import Callback, LightningModule, Trainer
from program import run, write_finetune
from torch import nn

import fusionkit
from fusionkit import Family, Mean, TaskArithmetic
from fusionkit.cli.fusion_report import Fusion, FusionReport
from fusionkit.reuse.fused import Fused
from fusionkit.reuse.module import ReuseModule
from fusionkit.tasks.digits import DigitTasks, base_model

pytest_plugins = ["fits"]

TASKS = ("digit", "rotation", "photo")
SETS = [c for n in (2, 3) for c in combinations(TASKS, n)]
METHODS = ["mean", "sum", "LoraHub"]
FAMILIES: dict[str, dict[str, Any]] = {
    "LoRA": {"method": "lora"},
    "L-LoRA": {"method": "linearized_lora", "learning_rate": 0.03},
    "full": {"method": "full", "learning_rate": 1e-3, "frozen": ["pos_embed"]},
}


class PowerCut(Callback):
    """Fails at a batch of the whole run, if one is set."""

    left: int | None = None

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: object) -> None:
        if PowerCut.left is not None:
            PowerCut.left -= 1
            if PowerCut.left == 0:
                raise RuntimeError("power cut")


def write(folder: Path, **changes: Any) -> Path:
    """A recipe whose results go beside it."""
    # The demo's base: drawn anew, by whatever the generator is at.
    base = {"class_path": "fusionkit.tasks.digits.base_model"}
    sections = {
        "families": FAMILIES,
        "merges": {
            "mean": {"class_path": "Mean"},
            "sum": {"class_path": "TaskArithmetic"},
        },
        "scales": [0.3, 1.0],
        "lorahub": {"class_path": "LoraHub", "init_args": {"evaluations": 3}},
        "search_batches": 1,
        "data": {"class_path": "fits.FewDigits", "init_args": {"tasks": list(TASKS)}},
        **changes,
    }
    model = {"model": base, "target_modules": ["qkv", "fc1"]}
    return write_finetune(folder / "fuse.yaml", model, f"{__name__}.PowerCut", **sections)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A recipe run to its end, and what it showed."""
    folder = tmp_path_factory.mktemp("fuse")
    return folder, run("fuse", "--config", write(folder))


@pytest.fixture
def again(finished: tuple[Path, str], tmp_path: Path) -> Path:
    """The same, moved: a copy for each test."""
    shutil.copytree(finished[0] / "out", tmp_path / "out")
    write(tmp_path)
    return tmp_path


def rows(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "out/fuse.json").read_text())
    return found


def times(folder: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")}


def score_by_hand(model: nn.Module, state: dict[str, torch.Tensor], task: str) -> float:
    data = FewDigits(TASKS)
    model.head = nn.Linear(64, data.num_classes[task])
    model.load_state_dict(state)
    loader = data.test_dataloader()[TASKS.index(task)]
    with torch.no_grad():
        right = [(model.eval()(x).argmax(1) == y) for x, y in loader]
    return float(torch.cat(right).float().mean())


class TestResults:
    def test_a_row_for_every_set_and_method(self, finished: tuple[Path, str]) -> None:
        found = [(row["family"], row["method"], row["tasks"]) for row in rows(finished[0])]
        wanted = []
        for family in FAMILIES:
            wanted += [(family, "single", task) for task in TASKS]
            wanted += [(family, method, "+".join(c)) for c in SETS for method in METHODS]
        assert found == wanted

    def test_files(self, finished: tuple[Path, str]) -> None:
        folder, shown = finished
        as_csv = list(csv.DictReader((folder / "out/fuse.csv").open()))
        assert [{k: str(v) for k, v in row.items()} for row in rows(folder)] == as_csv
        assert (folder / "out/fuse.png").read_bytes().startswith(b"\x89PNG")
        assert {p.name for p in (folder / "out").iterdir()} == {
            *("fuse.csv", "fuse.json", "fuse.png", "config.yaml"),
            *FAMILIES,
        }
        for name in (*FAMILIES, *METHODS, "single", "1 task", "2 tasks", "3 tasks"):
            assert name in shown
        assert shown.count("training '") == 9

    def test_scores_and_shares_by_hand(self, finished: tuple[Path, str]) -> None:
        """Every adapter on the one base, fused, applied and scored without the Trainer."""
        folder, _ = finished
        found = {(r["family"], r["method"], r["tasks"]): r for r in rows(folder)}
        torch.manual_seed(0)  # the recipe's seed
        base = base_model().eval()
        for family in FAMILIES:
            full = family == "full"
            paths = {task: folder / "out" / family / task / "finetuned" for task in TASKS}
            frozen = ["pos_embed"] if full else []
            settings = (HEAD, frozen, "merged" if full else "modules")
            own = {}
            for task in TASKS:
                reuse = ReuseModule(_copy(base))
                reuse.reuse(Family(base, paths, *settings))  # type: ignore[arg-type]
                reuse.switch(task)
                state = dict(reuse.model.state_dict())
                own[task] = score_by_hand(_copy(base), state, task)
                row = found[family, "single", task]
                assert (row["score"], row["share"], row["count"]) == (own[task], 1.0, 1)
            for chosen in SETS:
                part = Family(base, {t: paths[t] for t in chosen}, *settings)  # type: ignore[arg-type]
                for method in ("mean", "sum"):
                    row = found[family, method, "+".join(chosen)]
                    merge: Any = Mean() if method == "mean" else None
                    if merge is None:
                        merge = TaskArithmetic(float(row["settings"].split("scale=")[1][:-1]))
                        assert merge.scale in {0.3, 1.0}
                    scores = {}
                    for task in chosen:
                        reuse = ReuseModule(_copy(base))
                        reuse.reuse(Fused(part, merge))
                        reuse.switch(task)
                        state = dict(reuse.model.state_dict())
                        scores[task] = score_by_hand(_copy(base), state, task)
                    assert row["count"] == len(chosen)
                    assert row["score"] == pytest.approx(sum(scores.values()) / len(chosen))
                    # A share of a score of 0, which few steps may come to, is not a number.
                    shares = [scores[t] / own[t] if own[t] else math.nan for t in chosen]
                    wanted = pytest.approx(sum(shares) / len(chosen), nan_ok=True)
                    assert row["share"] == wanted

    def test_adapters_share_their_start(self, finished: tuple[Path, str]) -> None:
        out = finished[0] / "out"
        for family in ("LoRA", "L-LoRA"):
            starts = {(out / family / t / "finetuned/fusionkit.json").read_text() for t in TASKS}
            assert len(starts) == 1

    def test_weights_are_searched_within_bounds(self, finished: tuple[Path, str]) -> None:
        for row in rows(finished[0]):
            if row["method"] == "LoraHub":
                weights = eval(row["settings"].removeprefix("Weighted(weights=")[:-1])
                assert list(weights) == row["tasks"].split("+")
                assert all(abs(weight) <= 1.5 for weight in weights.values())


def _copy(base: nn.Module) -> nn.Module:
    model = tiny_vit()
    model.load_state_dict(base.state_dict())
    return model


class TestGoingOn:
    def test_when_all_is_done_nothing_is(self, again: Path, finished: tuple[Path, str]) -> None:
        before = times(again)
        assert len(before) == 9
        stamp = (again / "out/fuse.json").stat().st_mtime_ns
        shown = run("fuse", "--config", again / "fuse.yaml")
        assert "training" not in shown
        assert times(again) == before
        assert (again / "out/fuse.json").stat().st_mtime_ns == stamp
        table = finished[1][finished[1].index("Score (share") : finished[1].index("written")]
        assert table in shown

    def test_rows_that_are_missing(self, again: Path, finished: tuple[Path, str]) -> None:
        before = times(again)
        kept = rows(again)[:-5]
        (again / "out/fuse.json").write_text(json.dumps(kept))
        shown = run("fuse", "--config", again / "fuse.yaml")
        assert "training" not in shown
        assert times(again) == before
        assert rows(again) == rows(finished[0])

    def test_an_adapter_that_is_missing(self, again: Path, finished: tuple[Path, str]) -> None:
        """Trained again alone, and its rows scored again: as if it had never been away."""
        place = again / "out/L-LoRA/photo"
        before = times(again)
        wanted = (place / "finetuned/adapter_model.safetensors").read_bytes()
        shutil.rmtree(place)
        (again / "out/fuse.json").write_text(json.dumps(rows(again)[:20]))
        shown = run("fuse", "--config", again / "fuse.yaml")
        assert [line for line in shown.splitlines() if "training" in line] == [
            "L-LoRA: training 'photo'"
        ]
        assert (place / "finetuned/adapter_model.safetensors").read_bytes() == wanted
        changed = {p for p, stamp in times(again).items() if before[p] != stamp}
        assert changed == {place / "finetuned/adapter_model.safetensors"}
        assert rows(again) == rows(finished[0])

    def test_a_power_cut(
        self, tmp_path: Path, finished: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """While the second family's second adapter trains: what comes after is no different."""
        recipe = write(tmp_path)
        monkeypatch.setattr(PowerCut, "left", 4 * 4 + 2)
        with pytest.raises(RuntimeError, match="power cut"):
            run("fuse", "--config", recipe)
        assert len(times(tmp_path)) == 4
        monkeypatch.setattr(PowerCut, "left", None)
        run("fuse", "--config", recipe)
        assert rows(tmp_path) == rows(finished[0])
        for path in times(tmp_path):
            same = finished[0] / path.relative_to(tmp_path)
            assert path.read_bytes() == same.read_bytes(), path

    def test_training_goes_on_from_its_checkpoint(self, again: Path) -> None:
        place = again / "out/LoRA/digit"
        wanted = (place / "finetuned/adapter_model.safetensors").read_bytes()
        shutil.rmtree(place / "finetuned")
        last = torch.load(place / "checkpoints/last.ckpt", weights_only=True)
        assert last["global_step"] == 4
        run("fuse", "--config", again / "fuse.yaml")
        assert (place / "finetuned/adapter_model.safetensors").read_bytes() == wanted

    def test_a_run_of_an_earlier_version(self, again: Path) -> None:
        """Its recipe had other sections, and FusionKit's classes were in other modules."""
        config = again / "out/config.yaml"
        content = yaml.safe_load(config.read_text())
        del content["calibration"]
        content["spread"], content["ckpt_path"], content["overwrite"] = "tasks", "last", True
        own = content["model"]["init_args"]
        own["metric"] = "fusionkit.models.accuracy"
        assert own["model"]["class_path"] == "fusionkit.tasks.digits.base_model"
        own["model"]["class_path"] = "fusionkit.demo.base_model"
        config.write_text("# lightning.pytorch==2.5\n" + yaml.safe_dump(content, sort_keys=True))
        before, stamp = times(again), config.stat().st_mtime_ns
        (again / "out/fuse.json").write_text(json.dumps(rows(again)[:-1]))
        assert "training" not in run("fuse", "--config", again / "fuse.yaml")
        assert (times(again), config.stat().st_mtime_ns) == (before, stamp)
        assert len(rows(again)) == 9 + 3 * len(SETS) * len(METHODS)


class TestRefusals:
    @pytest.mark.parametrize("text", [None, "{", "- 1", "families: {LoRA: {}}"])
    def test_results_of_no_recipe(self, again: Path, text: str | None) -> None:
        config = again / "out/config.yaml"
        config.unlink() if text is None else config.write_text(text)
        output = run("fuse", "--config", again / "fuse.yaml", code=1)
        assert "holds the results of another recipe" in output

    @pytest.mark.parametrize(
        "change", ["--seed_everything=1", "--search_batches=2", "--trainer.max_steps=2"]
    )
    def test_a_recipe_of_other_results(self, again: Path, change: str) -> None:
        output = run("fuse", "--config", again / "fuse.yaml", change, code=1)
        assert "holds the results of another recipe" in output

    @pytest.mark.parametrize("begun", ["scored", "trained", "training"])
    def test_another_recipe_in_the_same_place(self, again: Path, begun: str) -> None:
        if begun != "scored":
            (again / "out/fuse.json").unlink()
        if begun == "training":
            for folder in (again / "out").glob("*/*/finetuned"):
                shutil.rmtree(folder)
        before = times(again)
        args = ["fuse", "--config", again / "fuse.yaml", "--model.rank=8"]
        output = run(*args, code=1)
        assert "holds the results of another recipe" in output
        assert "give another --out" in output
        assert times(again) == before

    def test_a_first_try_that_came_to_nothing_is_no_hindrance(self, tmp_path: Path) -> None:
        recipe = write(tmp_path, families={"LoRA": {}}, lorahub=None, scales=[])
        args = ["fuse", "--config", recipe, "--data.tasks=[digit,parity]"]
        run(*args, "--model.private=[hed.*]", code=1)
        run(*args)

    @pytest.mark.parametrize(
        ("settings", "message", "code"),
        [
            ({"rnak": 3}, "families: LoRA: the model has no setting 'rnak'", 1),
            ({"method": "loar"}, "loar", 2),
            ({"rank": "many"}, "many", 2),
        ],
    )
    def test_settings_of_a_family(
        self, tmp_path: Path, settings: dict[str, Any], message: str, code: int
    ) -> None:
        recipe = write(tmp_path, families={"full": {"method": "full"}, "LoRA": settings})
        output = run("fuse", "--config", recipe, code=code)
        assert message in output
        assert not (tmp_path / "out").exists()

    def test_adapters_that_are_there_already(
        self, finished: tuple[Path, str], tmp_path: Path
    ) -> None:
        there = {"finetuned": f"{finished[0]}/out/LoRA/*/finetuned"}
        run("fuse", "--config", write(tmp_path, families={"LoRA": there}))
        assert not list((tmp_path / "out").rglob("*.safetensors"))
        assert rows(tmp_path) == [row for row in rows(finished[0]) if row["family"] == "LoRA"]
        recipe = write(tmp_path, families={"LoRA": there}, out=str(tmp_path / "other"))
        output = run("fuse", "--config", recipe, "--data.tasks=[digit,parity]", code=1)
        assert "has no 'parity'; it has digit, photo, rotation" in output

    def test_the_recipes_metric_scores_the_fusions(
        self, finished: tuple[Path, str], tmp_path: Path
    ) -> None:
        """One for all tasks, or each task's own; what is an error has no share."""
        there = {"finetuned": f"{finished[0]}/out/LoRA/*/finetuned"}
        recipe = write(tmp_path, families={"LoRA": there}, lorahub=None)
        plain = {r["tasks"]: r["score"] for r in rows(finished[0]) if r["family"] == "LoRA"}
        found = {}
        own = {"digit": "MatthewsCorrCoef", "photo": "CalibrationError"}
        for place, metric in (("all", "MatthewsCorrCoef"), ("own", json.dumps(own))):
            args = ["--model.metric", metric, "--out", tmp_path / place / "out"]
            run("fuse", "--config", recipe, *args)
            found[place] = {(r["method"], r["tasks"]): r for r in rows(tmp_path / place)}
        torch.manual_seed(0)  # the recipe's seed
        paths = {task: f"{finished[0]}/out/LoRA/{task}/finetuned" for task in TASKS}
        reuse = ReuseModule(
            base_model(),
            finetuned=dict(paths),
            private=HEAD,
            adapters="modules",
            metric="MatthewsCorrCoef",
        )
        wanted = fusionkit.fuse({"LoRA": reuse}, FewDigits(TASKS), {"mean": Mean()})
        for row in wanted.rows:
            assert found["all"][row.method, row.tasks]["score"] == row.score
        single = {task: found["own"]["single", task]["score"] for task in TASKS}
        assert single["digit"] == found["all"]["single", "digit"]["score"] != plain["digit"]
        assert single["rotation"] == plain["rotation"]
        assert not math.isnan(found["own"]["mean", "digit+rotation"]["share"])
        assert math.isnan(found["own"]["mean", "rotation+photo"]["share"])

    def test_validation_rows_to_search_on(self, tmp_path: Path) -> None:
        data = {"class_path": f"{__name__}.NoValidation"}
        recipe = write(tmp_path, data=data, families={"LoRA": {}})
        output = run("fuse", "--config", recipe, code=1)
        assert "NoValidation has no validation rows to search on" in output
        recipe = write(tmp_path, data=data, families={"LoRA": {}}, scales=[], lorahub=None)
        run("fuse", "--config", recipe, "--out", tmp_path / "unsearched")


class NoValidation(DigitTasks):
    """Few rows, and none for validation."""

    def __init__(self) -> None:
        super().__init__(batch_size=32)
        self.tasks = ["parity", "photo"]

    def rows(self, task: str, test: bool) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = super().rows(task, test)
        return images[:64], labels[:64]


def fusion(family: str, method: str, tasks: str, score: float, share: float) -> Fusion:
    return Fusion(family, method, tasks, tasks.count("+") + 1, score, share)


class TestReport:
    ROWS = (
        fusion("A", "single", "x", 0.8, 1.0),
        fusion("A", "single", "y", 0.6, 1.0),
        fusion("A", "single", "z", 0.4, 1.0),
        fusion("A", "mean", "x+y", 0.5, 0.7),
        fusion("A", "mean", "x+z", 0.3, 0.5),
        fusion("A", "mean", "y+z", 0.1, 0.3),
        fusion("A", "mean", "x+y+z", 0.2, 0.4),
        fusion("B", "single", "x", 1.0, 1.0),
        fusion("B", "mean", "x+y", 0.9, 0.95),
    )

    def test_means_by_hand(self) -> None:
        means = FusionReport(list(self.ROWS)).means()
        assert means.keys() == {("A", "single"), ("A", "mean"), ("B", "single"), ("B", "mean")}
        assert means["A", "single"] == {1: pytest.approx((0.6, 1.0))}
        assert means["A", "mean"] == {2: pytest.approx((0.3, 0.5)), 3: pytest.approx((0.2, 0.4))}
        assert means["B", "mean"] == {2: pytest.approx((0.9, 0.95))}

    def test_table_by_hand(self) -> None:
        table = FusionReport(list(self.ROWS)).table()
        assert list(table.columns) == [
            *("family", "fused by", "1 task", "2 tasks", "3 tasks", "mean of 2 to 3")
        ]
        assert table.rows == [
            ("A", "single", "60.00% (100.00%)", "", "", ""),
            ("A", "mean", "", "30.00% (50.00%)", "20.00% (40.00%)", "25.00% (45.00%)"),
            ("B", "single", "100.00% (100.00%)", "", "", ""),
            ("B", "mean", "", "90.00% (95.00%)", "", "90.00% (95.00%)"),
        ]

    def test_two_tasks(self) -> None:
        table = FusionReport(list(self.ROWS[-2:])).table()
        assert table.columns[-1] == "mean of 2 to 2"
        assert [row[-1] for row in table.rows] == ["", "90.00% (95.00%)"]

    def test_plot(self, tmp_path: Path) -> None:
        many = [
            fusion(f"family {n}", f"method {m}", "x+y" if k == 2 else "x+y+z", 0.1 * n, 0.1 * m)
            for n in range(6)
            for m in range(12)
            for k in (2, 3)
        ]
        for name, chosen in (("a", list(self.ROWS)), ("b", many)):
            FusionReport(chosen).plot(tmp_path / f"{name}.png")
            assert (tmp_path / f"{name}.png").stat().st_size > 10_000
        assert len(list(tmp_path.iterdir())) == 2
