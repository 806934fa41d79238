"""The command line as a person uses it: the installed program, real recipes, real messages."""

import csv
import json
import os
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from processes import together
from program import PROGRAM, run
from safetensors.torch import load_file
from tiny_net import TASKS, Files

import fusionkit


@pytest.mark.slow
def test_the_installed_program(recipe: Path, tmp_path: Path) -> None:
    """As from a shell: exit codes, one message on stderr, no traceback, nothing left behind."""
    command = [str(PROGRAM), "compress", "--config", str(recipe)]
    for pattern, code, message in (("hed.*", 1, "'hed.*'"), ("head.*", 0, "")):
        call = [*command, "--model.private", f"[{pattern}]"]
        done = subprocess.run(call, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == code, done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert (tmp_path / "bundle").exists() == (code == 0)
    assert not list(tmp_path.glob(".*tmp*"))


def test_compress_inspect_test_export(recipe: Path, files: Files, tmp_path: Path) -> None:
    """The whole way, as the README tells it."""
    table = run("compress", "--config", recipe)
    assert all(task in table for task in TASKS)
    assert "bits/param" in table
    bundle = fusionkit.Bundle.load(tmp_path / "bundle")
    assert bundle.tasks == TASKS

    shown = run("inspect", tmp_path / "bundle")
    assert bundle.manifest.base.fingerprint in shown
    assert str(files.base) in shown

    scores = run("test", "--config", recipe)
    rows = list(csv.DictReader((tmp_path / "out/scores.csv").open()))
    assert [row["task"] for row in rows] == [*TASKS, "mean"]
    assert f"{100 * float(rows[0]['score']):.2f}" in scores
    as_json = json.loads((tmp_path / "out/scores.json").read_text())
    found = [*as_json["tasks"].values(), as_json["mean"]]
    assert [row["score"] for row in found] == [float(row["score"]) for row in rows]
    assert (as_json["model"], as_json["fusionkit"]) == (repr(bundle.codec), version("fusionkit"))
    assert [row["rows"] for row in rows] == ["34", "41", "48", "123"]
    resolved = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    assert resolved["model"]["codec"]["class_path"] == "fusionkit.EMR"

    out = tmp_path / "exported" / "bee.safetensors"
    run("export", tmp_path / "bundle", "--task", "bee", "--out", out)
    wanted = bundle.state_dict("bee")
    exported = load_file(out)
    assert exported.keys() == wanted.keys() - {"decoder.weight"}
    assert all(torch.equal(exported[name], wanted[name]) for name in exported)
    assert "exists" in run("export", tmp_path / "bundle", "--task=bee", f"--out={out}", code=1)


def test_every_setting_can_be_overridden(recipe: Path, tmp_path: Path) -> None:
    run(
        *("compress", "--config", recipe, "--model.codec", "MagnitudePrune"),
        *("--model.codec.density", 0.25, "--model.bundle", tmp_path / "other"),
    )
    codec = fusionkit.Bundle.load(tmp_path / "other").codec
    assert codec == fusionkit.MagnitudePrune(density=0.25)


def test_compare(recipe: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(recipe.read_text())
    del content["model"]["bundle"], content["model"]["codec"]
    content["codecs"] = {
        "emr": {"class_path": "EMR"},
        "dense": {"class_path": "Dense", "init_args": {"dtype": "fp32"}},
        "peru": {
            "class_path": "MagnitudePrune",
            "init_args": {"density": 0.1, "merge": {"class_path": "TaskArithmetic"}},
        },
    }
    recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    table = run("compare", "--config", recipe)
    rows = list(csv.DictReader((tmp_path / "out/compare.csv").open()))
    assert [row["name"] for row in rows] == ["fine-tuned", "base", "emr", "dense", "peru"]
    assert all(row["name"] in table for row in rows)
    own, dense = rows[0], rows[3]
    assert float(own["share"]) == 1
    assert dense["mean_score"] == own["mean_score"]
    assert float(dense["bits_per_parameter"]) >= 32
    assert float(own["bits_per_parameter"]) == 32
    assert (tmp_path / "out/compare.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((tmp_path / "out/compare.json").read_text())) == 5


def test_compressed_on_the_fly_and_uncompressed(recipe: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(recipe.read_text())
    del content["model"]["bundle"]
    recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    assert "EMR(" in run("test", "--config", recipe)
    assert "fine-tuned, uncompressed" in run("test", "--config", recipe, "--model.codec", "null")


def test_codecs_lists_what_is_installed() -> None:
    listing = run("codecs")
    for name in ("magnitude_prune", "svd", "emr", "task_arithmetic", "ties", "fusionkit 0."):
        assert name in listing


@pytest.mark.parametrize("name", ["SVD", "svd", "fusionkit.SVD"])
def test_all_of_one_codec(name: str) -> None:
    text = run("codecs", name)
    assert "--rank" in text
    assert "number of singular directions" in text
    assert "b r (m + n) bits" in text
    assert "--codec svd" in text
    assert "class_path: fusionkit.SVD" in text
    assert "did you mean 'svd'" in run("codecs", "svdd", code=1)


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["--model.codec", "Emrr"], "Emrr", 2),
        (["--model.codec.rescal", "l1"], "rescal", 2),
        (["--model.codecc", "EMR"], "codecc", 2),
        (
            ["--model.finetuned.ant", "no/such.safetensors", "--overwrite=true"],
            "no/such.safetensors",
            1,
        ),
        (["--model.private", "[hed.*]"], "'hed.*'", 1),
        (["--model.codec", "MagnitudePrune", "--model.codec.density", "7"], "density", 1),
    ],
)
def test_bad_settings_get_one_clear_message(
    recipe: Path, tmp_path: Path, arguments: list[str], message: str, code: int
) -> None:
    output = run("compress", "--config", recipe, *arguments, code=code)
    assert message in output
    assert len(output.splitlines()) < 25
    assert not (tmp_path / "bundle").exists()
    assert not list(tmp_path.glob(".*tmp*"))


def test_unknown_codec_names_the_installed_ones(recipe: Path) -> None:
    output = run("compress", "--config", recipe, "--model.codec", "Emrr", code=2)
    assert "installed" in output
    assert "MagnitudePrune" in output


def test_a_yaml_typo_is_named(recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("private:", "privat:"))
    assert "privat" in run("compress", "--config", recipe, code=2)


def test_existing_bundle_and_missing_bundle(recipe: Path, tmp_path: Path) -> None:
    assert "no such bundle" in run("test", "--config", recipe, code=1)
    run("compress", "--config", recipe)
    assert "--overwrite" in run("compress", "--config", recipe, code=1)
    run("compress", "--config", recipe, "--overwrite", "true")
    assert "has no task 'dog'" in run(
        "export", tmp_path / "bundle", "--task=dog", f"--out={tmp_path / 'x.pt'}", code=1
    )


def test_unknown_verb() -> None:
    assert "no verb 'compres'" in run("compres", code=2)


@pytest.mark.slow
def test_who_reads_may_stop_reading() -> None:
    """As `fusionkit codecs SVD | head -1` does."""
    reads, writes = os.pipe()
    os.close(reads)
    call = [PROGRAM, "codecs", "SVD"]
    done = subprocess.run(
        call, stdout=writes, stderr=subprocess.PIPE, text=True, timeout=240, check=False
    )
    os.close(writes)
    assert done.returncode == 1
    assert done.stderr == ""


@pytest.mark.nightly
@pytest.mark.slow
def test_two_processes_report_once_what_one_reports(recipe: Path, tmp_path: Path) -> None:
    """Started by the program, as Lightning does."""
    run("compress", "--config", recipe)
    run("test", "--config", recipe, "--out", tmp_path / "one")
    done = subprocess.run(
        [
            *(PROGRAM, "test", "--config", recipe, "--out", tmp_path / "two"),
            *("--spread", "rows", "--trainer.devices=2", "--trainer.strategy=ddp"),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    check_reported_once(done.stdout, tmp_path)


def check_reported_once(shown: str, folder: Path) -> None:
    assert shown.count("fine-tuned") == 1
    assert shown.count("written:") == 2
    for name in ("scores.csv", "scores.json"):
        assert (folder / "two" / name).read_bytes() == (folder / "one" / name).read_bytes()


def test_two_processes_by_task_report_once(recipe: Path, tmp_path: Path) -> None:
    """Started by others, as `torchrun` does."""
    run("compress", "--config", recipe)
    run("test", "--config", recipe, "--out", tmp_path / "one")
    together(2, by_task, recipe, tmp_path)
    shown = [(tmp_path / f"shown{rank}").read_text() for rank in range(2)]
    check_reported_once("".join(shown), tmp_path)


def by_task(rank: int, count: int, recipe: Path, folder: Path) -> None:
    own = ("--spread", "tasks", f"--trainer.devices={count}", "--trainer.strategy=ddp")
    shown = run("test", "--config", recipe, "--out", folder / "two", *own)
    (folder / f"shown{rank}").write_text(shown)


def test_metrics_by_name(recipe: Path, tmp_path: Path) -> None:
    """In YAML, and on the command line."""
    content = yaml.safe_load(recipe.read_text())
    content["model"]["bundle"] = None
    recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    run("test", "--config", recipe)
    content["model"]["metric"] = {
        "ant": "MatthewsCorrCoef",
        "bee": {"class_path": "F1Score", "init_args": {"average": "macro"}},
    }
    recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    run("test", "--config", recipe, "--out", tmp_path / "by_name")
    run("test", "--config", recipe, "--model.metric", "Accuracy", "--out", tmp_path / "same")
    scores = {
        name: (tmp_path / name / "scores.csv").read_text().splitlines()
        for name in ("out", "by_name", "same")
    }
    assert scores["same"] == scores["out"]
    ant, bee, cat = (scores["by_name"][line] == scores["out"][line] for line in range(1, 4))
    assert (ant, bee, cat) == (False, False, True)


def test_recipes_of_before_are_told_what_to_write(recipe: Path) -> None:
    content = yaml.safe_load(recipe.read_text())
    content["model"]["calibration"] = {"rows": 8}
    recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    mend = "`calibration` is a section of its own"
    assert mend in run("compress", "--config", recipe, code=2)


@pytest.mark.parametrize("kind", ["Checkpoint", "fusionkit.Checkpoint", "fusionkit.Checkpoint.of"])
def test_a_base_with_settings(
    recipe: Path, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A variant, say; and places that only the machine knows, as variables and `~`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MODELS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "base"
    folder.mkdir()
    files.base.rename(folder / "model.fp16.safetensors")
    content = yaml.safe_load(recipe.read_text())
    own = content["model"]
    own["base"] = {"class_path": kind, "init_args": {"source": "$MODELS/base", "variant": "fp16"}}
    own["finetuned"] = {task: f"${{MODELS}}/{task}.safetensors" for task in TASKS}
    own["bundle"], content["out"] = "~/there", "~/results"
    recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    run("compress", "--config", recipe)
    bundle = fusionkit.Bundle.load(tmp_path / "there")
    assert (bundle.base.label, bundle.base.variant) == (str(folder), "fp16")
    run("test", "--config", recipe)
    assert (tmp_path / "results" / "scores.csv").is_file()
    run("export", "~/there", "--task=bee", "--out=~/bee.pt", "--base=~/base", "--variant=fp16")
    assert (tmp_path / "bee.pt").is_file()
    assert not (tmp_path / "~").exists()
    source, wrong = own["base"]["init_args"], {"class_path": kind, "init_args": {"source": "no"}}
    for change, message in (
        ({"base": {**own["base"], "init_args": {**source, "source": "${NOWHERE}/base"}}}, "${NOW"),
        ({"base": {**own["base"], "init_args": {**source, "variant": "f"}}}, "variants fp16"),
        ({"finetuned": {**own["finetuned"], "bee": wrong}}, "no: no such file; check the path"),
    ):
        recipe.write_text(yaml.safe_dump({**content, "model": {**own, **change}}))
        said = run("compress", "--config", recipe, "--overwrite", "true", code=1)
        assert message in said
        assert said.startswith("fusionkit compress: ")


def test_what_only_evaluation_reads(recipe: Path) -> None:
    mend = "`spread` is read by 'fusionkit test' and 'fusionkit compare' alone"
    assert mend in run("calibrate", "--config", recipe, "--spread", "tasks", code=2)
    recipe.write_text(recipe.read_text() + "spread: tasks\n")
    assert mend in run("calibrate", "--config", recipe, code=2)
