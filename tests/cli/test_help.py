"""Help that one reads, and what a shell completes."""

import subprocess
from pathlib import Path

import pytest
from program import run

from fusionkit.cli import completion
from fusionkit.cli import main as cli

RECIPES = ("calibrate", "compare", "compress", "fit", "fuse", "sweep", "test")


def test_the_overview_has_every_verb() -> None:
    assert all(f"  {verb} " in run("--help") for verb in cli.VERBS)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_it_is_short(verb: str) -> None:
    text = run(verb, "--help")
    assert 4 < len(text.splitlines()) <= 100
    assert max(map(len, text.splitlines())) <= 110
    assert run("help", verb) == text


@pytest.mark.parametrize("verb", RECIPES)
def test_a_recipes_help_has_what_the_verb_reads(verb: str) -> None:
    """The recipe is not asked for; the sections of Lightning's have a line."""
    text = run(verb, "--help", "--config=R.yaml")
    plain = " ".join(text.split())
    assert len(text.splitlines()) <= 100
    written = {"compress": "bundle", "calibrate": "bundle", "fit": "fine-tune"}
    assert (f"--overwrite replace the {written.get(verb)}" in plain) == (verb in written)
    assert ("--spread" in text) == (verb in ("test", "compare"))
    assert ("--ckpt_path" in text) == (verb in ("calibrate", "fit", "fuse"))
    assert ("--calibration.rows N" in text) == (verb in ("calibrate", "compare"))
    assert "--trainer.SETTING" in text
    assert "--trainer.accelerator" not in text
    if verb in ("fit", "fuse"):
        assert "--model.target_modules […]" in text
    else:
        assert "--model.codec CODEC how the fine-tuned checkpoints are compressed" in plain


def test_all_of_it_lists_the_trainers_settings_and_no_module() -> None:
    for verb in ("compress", "test"):
        text = run(verb, "--help-all")
        assert "--trainer.accumulate_grad_batches" in text
        assert "--model.model" in text
        assert "torch.nn.modules" not in text
        assert "torch.nn.Linear" not in text
        assert len(text.splitlines()) < 600


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script of bash, of a few verbs."""
    path = tmp_path_factory.mktemp("completion") / "fusionkit"
    path.write_text(completion.script("bash", ["compress", "export", "codecs"]))
    return path


@pytest.mark.parametrize(
    ("words", "offered", "not_offered"),
    [
        (["comp"], ["compress"], ["codecs", "export"]),
        (["--c"], ["--completion"], []),
        (["codecs", "s"], ["sketch", "svd"], ["emr"]),
        (["compress", "base", "tuned", "--codec", "sv"], ["svd"], ["sketch"]),
        (["compress", "base", "--ra"], ["--rank"], ["--out"]),
        (["compress", "--config", "r.yaml", "--model.pr"], ["--model.private"], []),
        (["compress", "--config", "r.yaml", "--trainer.acc"], ["--trainer.accelerator"], []),
        (["export", "x.bundle", "--fo"], ["--format", "--for_server"], ["--rank"]),
        (["export", "x.bundle", "--format", "p"], ["peft"], ["model"]),
        (["export", "fold"], ["folder.bundle"], ["--format"]),
    ],
)
def test_bash_completes(
    script: Path, tmp_path: Path, words: list[str], offered: list[str], not_offered: list[str]
) -> None:
    (tmp_path / "folder.bundle").mkdir()
    line = " ".join(["fusionkit", *words])
    code = (
        f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words)}; _fusionkit; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        timeout=60,
    )
    found = done.stdout.split()
    assert {*offered} <= {*found}
    assert not {*not_offered} & {*found}
    assert all(each.startswith(words[-1]) for each in found)


def test_another_shell_is_refused() -> None:
    said = run("--completion", "fish", code=2)
    assert "--completion: expected bash or zsh, got 'fish'" in said
    assert "expected bash or zsh, got ''" in run("--completion", code=2)
