"""`fusionkit.sweep` and `fusionkit sweep`: sizes are files', errors those of decoded deltas."""

import csv
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from program import run
from tiny_net import TASKS, Files, TinyNet
from tiny_tasks import PRIVATE, States

import fusionkit
from fusionkit import DBMS, EMR, SVD, Dense, Family, MagnitudePrune, Mean, Merged, Sketch
from fusionkit.cli.sweep_report import SweepReport, Swept, TaskCost
from fusionkit.codecs import sketch
from fusionkit.errors import CodecError, FamilyError, FusionKitError

CODECS: dict[str, Any] = {
    "SVD": [SVD(1, dtype="int8"), SVD(2, dtype="int8"), SVD(1, dtype="int4")],
    "EMR": EMR(),
    "mean": Merged(Mean()),
    "DBMS": DBMS(MagnitudePrune(0.2)),
    "Sketch": [Sketch(bits=48.0), Sketch(bits=64.0)],
}
SETTINGS = [
    *("SVD rank=1 dtype=int8", "SVD rank=2 dtype=int8", "SVD rank=1 dtype=int4"),
    *("EMR", "mean", "DBMS", "Sketch bits=48.0", "Sketch bits=64.0"),
]


def flat(codecs: dict[str, Any]) -> list[Any]:
    return [c for each in codecs.values() for c in (each if isinstance(each, list) else [each])]


def by_hand(bundle: fusionkit.Bundle, family: Family, task: str) -> tuple[float, float, float]:
    """‖δ‖², ‖δ̂ − δ‖² and ⟨δ̂, δ⟩ in float64, all tensors at once."""
    deltas, decoded = [], []
    for vectors in family:
        delta = vectors[family.tasks.index(task)].double().flatten()
        own = bundle.delta(task, vectors.name)
        deltas.append(delta)
        decoded.append(torch.zeros_like(delta) if own is None else own.double().flatten())
    one, other = torch.cat(deltas), torch.cat(decoded)
    return float(one @ one), float((other - one) @ (other - one)), float(other @ one)


def energy_of_matrices(base: TinyNet) -> float:
    names = ("embed.weight", "conv.weight", "hidden.weight")
    return sum(float(base.state_dict()[name].double().square().sum()) for name in names)


class TestSweep:
    def test_as_bundles_have_it(self, files: Files, base: TinyNet, tmp_path: Path) -> None:
        """Sizes to the byte, errors as added up by hand, of every kind of codec."""
        results = fusionkit.sweep(files.base, files.finetuned, CODECS, private=PRIVATE)
        assert [row.label for row in results.rows] == SETTINGS
        family = Family(files.base, files.finetuned, PRIVATE)
        of_base = energy_of_matrices(base)
        for place, (row, codec) in enumerate(zip(results.rows, flat(CODECS), strict=True)):
            out = tmp_path / str(place)
            bundle = fusionkit.compress(files.base, files.finetuned, codec, out, private=PRIVATE)
            assert row.settings == repr(codec)
            assert row.nbytes == bundle.nbytes
            assert row.nbytes == sum(path.stat().st_size for path in out.iterdir())
            assert row.bits_per_parameter == bundle.bits_per_parameter
            assert tuple(row.tasks) == TASKS
            for task, cost in row.tasks.items():
                record = bundle.manifest.tasks[task]
                assert cost.nbytes == record.file.bytes
                bits = 8 * (record.file.bytes - record.private_bytes) / family.parameters
                assert cost.bits_per_parameter == pytest.approx(bits)
                energy, error, dot = by_hand(bundle, family, task)
                assert cost.weight_error == pytest.approx(error / energy, rel=1e-9)
                assert cost.projection == pytest.approx(dot / energy, rel=1e-9)
                assert cost.noise == pytest.approx(error / of_base, rel=1e-9)

    def test_what_is_kept_whole_has_no_error(self, base: TinyNet, finetuned: States) -> None:
        [row] = fusionkit.sweep(base, finetuned, {"all": Dense("fp32")}, private=PRIVATE).rows
        assert (row.weight_error, row.projection, row.noise) == (0, 1, 0)
        assert row.bits_per_parameter >= 32

    def test_a_task_that_is_the_base(self, base: TinyNet, finetuned: States) -> None:
        """Has no error that could be related to its delta; the others' mean is without it."""
        one = {"same": base.state_dict(), "ant": finetuned["ant"]}
        [row] = fusionkit.sweep(base, one, {"svd": SVD(1)}, private=PRIVATE).rows
        same, ant = row.tasks["same"], row.tasks["ant"]
        assert (same.weight_error, same.projection, same.noise) == (None, None, 0)
        assert row.weight_error == ant.weight_error
        assert json.loads(
            json.dumps(fusionkit.sweep(base, one, {"svd": SVD(1)}, private=PRIVATE).flat())
        )

    def test_nothing_is_left(
        self,
        files: Files,
        temporary: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        """Of any codec; nor is there more than one bundle at any time."""
        here = tmp_path / "here"
        here.mkdir()
        monkeypatch.chdir(here)
        made: list[int] = []
        mkdtemp = tempfile.mkdtemp

        def counted(**named: Any) -> str:
            made.append(len(list(temporary.iterdir())))
            return mkdtemp(**named)

        monkeypatch.setattr(tempfile, "mkdtemp", counted)
        fusionkit.sweep(files.base, files.finetuned, CODECS, private=PRIVATE)
        assert made == [0] * len(SETTINGS)
        assert [*temporary.iterdir(), *here.iterdir()] == []
        assert capfd.readouterr() == ("", "")

    def test_measured_once(
        self, base: TinyNet, finetuned: States, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Singular values do not hang on the budget."""
        seen: list[str] = []
        once = sketch.measure

        def measure(vectors: Any) -> Any:
            seen.append(vectors.name)
            return once(vectors)

        measure.__qualname__ = "measure"
        monkeypatch.setattr(sketch, "measure", measure)
        grid = [Sketch(bits=bits) for bits in (48.0, 52.0, 56.0, 64.0)]
        results = fusionkit.sweep(base, finetuned, {"Sketch": grid}, private=PRIVATE)
        assert len(seen) == len(set(seen))
        assert all(row.encode_seconds > 0 for row in results.rows)

    def test_changed_vectors_are_measured_anew(self, base: TinyNet, finetuned: States) -> None:
        """Within a DBMS a codec encodes other vectors than by itself."""
        within = DBMS(Sketch(bits=56.0))
        [alone] = fusionkit.sweep(base, finetuned, {"own": within}, private=PRIVATE).rows
        both: dict[str, Any] = {"plain": within.codec, "own": within}
        _, after = fusionkit.sweep(base, finetuned, both, private=PRIVATE).rows
        assert after.tasks == alone.tasks

    def test_written(self, files: Files, tmp_path: Path) -> None:
        out = tmp_path / "new" / "out"
        results = fusionkit.sweep(files.base, files.finetuned, CODECS, out, private=PRIVATE)
        assert {path.name for path in out.iterdir()} == {"sweep.csv", "sweep.json", "sweep.png"}
        rows = list(csv.DictReader((out / "sweep.csv").open()))
        wanted = [(row.label, task) for row in results.rows for task in TASKS]
        assert [(f"{r['codec']} {r['setting']}".strip(), r["task"]) for r in rows] == wanted
        assert json.loads((out / "sweep.json").read_text()) == results.flat()
        assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")

    def test_the_table_says_what_it_does_not_tell(self, base: TinyNet, finetuned: States) -> None:
        results = fusionkit.sweep(base, finetuned, {"EMR": EMR()}, private=PRIVATE)
        assert "do not rank codecs of different kinds" in results.table().note
        assert "fusionkit compare" in results._repr_html_()

    @pytest.mark.parametrize("codecs", [{}, {"SVD": []}])
    def test_no_codec(self, base: TinyNet, finetuned: States, codecs: dict[str, Any]) -> None:
        with pytest.raises(FusionKitError, match="there is no codec to sweep"):
            fusionkit.sweep(base, finetuned, codecs, private=PRIVATE)

    def test_checks_before_anything_is_compressed(
        self, base: TinyNet, finetuned: States, tmp_path: Path
    ) -> None:
        both: dict[str, Any] = {"EMR": EMR(), "mine": "SVD"}
        with pytest.raises(CodecError, match="expected a DeltaCodec, got 'SVD'"):
            fusionkit.sweep(base, finetuned, both, tmp_path / "out", private=PRIVATE)
        with pytest.raises(FamilyError, match="head"):
            fusionkit.sweep(base, finetuned, {"EMR": EMR()}, tmp_path / "out")
        with pytest.raises(FusionKitError, match="written to the local disk"):
            fusionkit.sweep(base, finetuned, {"EMR": EMR()}, "memory://out", private=PRIVATE)
        assert not (tmp_path / "out").exists()


def row(name: str, point: str, curve: str, bits: float, error: float | None) -> Swept:
    cost = TaskCost(1, bits, error, 1.0, error)
    return Swept(name, point, curve, "", int(1000 * bits), 1.0, bits, 0.0, {"ant": cost})


class TestPlot:
    def test_a_curve_is_along_one_setting(self) -> None:
        """By size, whatever the order of the rows; one for each value of the other settings."""
        rows = [
            row("SVD", "rank=2", "dtype=int8", 2.0, 0.5),
            row("SVD", "rank=1", "dtype=int8", 1.0, 0.7),
            row("SVD", "rank=1", "dtype=int4", 0.5, 0.8),
            row("EMR", "", "", 3.0, 0.4),
        ]
        [axes] = SweepReport(rows).figure().axes
        curves = [(list(line.get_xdata()), line.get_label()) for line in axes.lines[:3]]
        assert [xs for xs, _ in curves] == [[0.5], [1.0, 2.0], [3.0]]
        assert [text.get_text() for text in axes.texts] == [
            "SVD rank=1 dtype=int4",
            "1",
            "2",
            "EMR",
        ]
        legend = [text.get_text() for text in axes.get_legend().get_texts()]
        assert legend == ["SVD dtype=int8", "as if nothing were kept"]

    def test_no_error_is_drawn_too(self) -> None:
        rows = [row("all", "", "", 32.0, 0.0), row("most", "", "", 1.0, 0.5)]
        [axes] = SweepReport([*rows, row("base", "", "", 2.0, None)]).figure().axes
        heights = [float(line.get_ydata()[0]) for line in axes.lines[:3]]
        assert heights == [0.5, 0.25, 0.25]
        assert [text.get_text() for text in axes.texts][2] == "all (0 ↓)"

    def test_labels_do_not_meet(self) -> None:
        """Of twenty settings, eight of them close together."""
        rows = [row("a", f"bits={i}", "", 0.03 * 1.3**i, 20 / 1.3**i) for i in range(12)]
        rows += [row(f"codec {i}", "", "", 1 + 0.01 * i, 0.5 + 0.002 * i) for i in range(8)]
        figure = SweepReport(rows).figure()
        figure.draw_without_rendering()
        boxes = [text.get_window_extent().padded(-1) for text in figure.axes[0].texts]
        boxes = [box for box in boxes if box.width > 0]
        assert len(boxes) >= 20
        meeting = [(i, j) for i in range(20) for j in range(i) if boxes[i].overlaps(boxes[j])]
        assert not meeting


@pytest.fixture
def swept(recipe: Path) -> Path:
    """The recipe, of a codec that its own grid is about."""
    content = yaml.safe_load(recipe.read_text())
    content["model"]["codec"] = {"class_path": "SVD", "init_args": {"rank": 1}}
    del content["data"]
    recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    return recipe


def rows_of(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "sweep.csv").open()))


class TestCommand:
    def test_grid(self, swept: Path, tmp_path: Path) -> None:
        """Over settings of the recipe's own codec, which need not be one without them."""
        shown = run(
            *("sweep", "--config", swept, "--model.codec", "SVD"),
            *("--grid.rank", "[1, 2, 3]", "--grid.dtype", "[int8, int4]"),
        )
        settings = [f"rank={rank} dtype={d}" for rank in (1, 2, 3) for d in ("int8", "int4")]
        assert [r["setting"] for r in rows_of(tmp_path / "out")] == [
            setting for setting in settings for _ in TASKS
        ]
        assert all(f"SVD {setting} " in shown for setting in settings)
        assert "do not rank codecs of different kinds" in " ".join(shown.split())
        assert {path.name for path in (tmp_path / "out").iterdir()} == {
            *("config.yaml", "sweep.csv", "sweep.json", "sweep.png")
        }
        assert not (tmp_path / "bundle").exists()
        kept = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
        assert kept["grid"] == {"rank": [1, 2, 3], "dtype": ["int8", "int4"]}
        assert kept["model"]["codec"]["class_path"].endswith("SVD")

    def test_codecs(self, swept: Path, files: Files, tmp_path: Path) -> None:
        """As `compare` has them; lists are values to try, unless the setting is a list itself."""
        content = yaml.safe_load(swept.read_text())
        content["codecs"] = {
            "emr": {"class_path": "EMR"},
            "own": "Dense",
            "within": {
                "class_path": "DBMS",
                "init_args": {
                    "grid": [0.0, 1.0],
                    "codec": {"class_path": "SVD", "init_args": {"rank": 1}},
                },
            },
            "cut": {
                "class_path": "DBMS",
                "init_args": {
                    "codec": {"class_path": "fusionkit.SVD", "init_args": {"rank": [1, 2]}}
                },
            },
            "full": {"class_path": "fusionkit.SVD", "init_args": {"rank": [1, 2]}},
        }
        swept.write_text(yaml.safe_dump(content, sort_keys=False))
        run("sweep", "--config", swept)
        found = dict.fromkeys((r["codec"], r["setting"]) for r in rows_of(tmp_path / "out"))
        cut = [("cut", "codec.rank=1"), ("cut", "codec.rank=2")]
        full = [("full", "rank=1"), ("full", "rank=2")]
        assert [*found] == [("emr", ""), ("own", ""), ("within", ""), *cut, *full]
        by_hand = fusionkit.sweep(
            files.base,
            files.finetuned,
            {"within": DBMS(SVD(1), grid=(0.0, 1.0)), "cut": [DBMS(SVD(1)), DBMS(SVD(2))]},
            private=PRIVATE,
        )
        errors = [r["weight_error"] for r in rows_of(tmp_path / "out")][
            2 * len(TASKS) : 5 * len(TASKS)
        ]
        assert errors == [str(r["weight_error"]) for r in by_hand.flat()]

    @pytest.mark.parametrize(
        ("arguments", "message", "code"),
        [
            (["--grid.rnak", "[1]"], "grid: SVD has no setting 'rnak'; it has rank, energy", 1),
            (["--model.codec=null"], "there is no codec to sweep; give --model.codec CODEC", 1),
            (["--grid.rank", "[]"], "SVD: a setting's list is empty; give it a value to try", 1),
            (["--grid.rank", "[1, two]"], "codecs: SVD: ", 2),
            (["--grid.energy", "[0.5]"], "--model.codec.SETTING null takes out", 1),
            (
                ["--codecs", "{a: {class_path: SDV}}"],
                "codecs.a: no codec 'SDV'; did you mean 'svd'?",
                2,
            ),
            (["--codecs", "{a: {class_path: SVD, init_args: {rnak: [1]}}}"], "rnak", 2),
            (
                ["--codecs", "{SVD: {class_path: EMR}}", "--grid.rank", "[1]"],
                "codecs: 'SVD' is what the grid of the recipe's codec is called",
                1,
            ),
            (["--model.base=nowhere"], "nowhere", 1),
        ],
    )
    def test_mistakes(
        self, swept: Path, tmp_path: Path, arguments: list[str], message: str, code: int
    ) -> None:
        shown = run("sweep", "--config", swept, *arguments, code=code)
        assert message in shown
        assert "Traceback" not in shown
        assert not (tmp_path / "out").exists()


def test_tables_are_written_without_plots(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = run(
        "sweep", "--config", recipe, "--grid.dtype", "[fp16, int8]", "--out", tmp_path / "out"
    )
    assert "pip install 'fusionkit[plots]'" in said
    assert (tmp_path / "out/sweep.csv").is_file()
    assert not (tmp_path / "out/sweep.png").exists()
