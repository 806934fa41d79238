"""A recipe's file: variables, paths from its folder, modules beside it."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml
from program import PROGRAM, run
from tiny_net import TASKS, TESTS, Files

import fusionkit
from fusionkit.cli.recipe_file import RecipeFile
from fusionkit.errors import FusionKitError, UsageError


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another folder to work in than the recipe's."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def local(recipe: Path, files: Files) -> Path:
    """The recipe with its models in a folder beside it, by relative paths."""
    models = recipe.parent / "models"
    models.mkdir()
    for name, path in {"base": files.base, **files.finetuned}.items():
        path.rename(models / f"{name}.safetensors")
    content = yaml.safe_load(recipe.read_text())
    content["model"]["base"] = "./models/base.safetensors"
    content["model"]["finetuned"] = {task: f"models/{task}.safetensors" for task in TASKS}
    content["model"]["bundle"], content["out"] = "made/bundle", "made/out"
    recipe.write_text(yaml.safe_dump(content))
    return recipe


def test_variables(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole value, or a part; of any type; what is not set is told with its key."""
    monkeypatch.setenv("CODEC", "svd")
    monkeypatch.setenv("WIDTH", "2")
    monkeypatch.setenv("PLACE", str(tmp_path))
    content = yaml.safe_load(recipe.read_text())
    content["model"]["codec"] = {"class_path": "${CODEC}", "init_args": {"rank": "${WIDTH}"}}
    content["model"]["bundle"] = "${PLACE}/there"
    content["out"] = "$${PLACE}"
    recipe.write_text(yaml.safe_dump(content))
    run("compress", "--config", recipe)
    assert fusionkit.Bundle.load(tmp_path / "there").codec == fusionkit.SVD(rank=2)
    monkeypatch.delenv("WIDTH")
    said = run("compress", "--config", recipe, "--overwrite", code=1)
    assert said == (
        f"fusionkit compress: {recipe}: model.codec.init_args.rank: ${{WIDTH}}: the environment "
        "variable 'WIDTH' is not set; set it (export WIDTH=…), or write the value out\n"
    )


def test_paths_from_the_recipes_folder(recipe: Path, files: Files, elsewhere: Path) -> None:
    """What is read; what is written goes by the working directory."""
    run("compress", "--config", local(recipe, files))
    assert fusionkit.Bundle.load(elsewhere / "made/bundle").tasks == TASKS
    run("test", "--config", recipe)
    assert (elsewhere / "made/out/scores.csv").is_file()
    assert not (recipe.parent / "made").exists()


def test_a_pattern_from_the_recipes_folder(recipe: Path, files: Files, elsewhere: Path) -> None:
    content = yaml.safe_load(local(recipe, files).read_text())
    content["model"]["base"] = "../base/model.safetensors"
    content["model"]["finetuned"] = "models/*.safetensors"
    (recipe.parent / "base").mkdir()
    own = recipe.parent / "recipes"
    own.mkdir()
    (recipe.parent / "models/base.safetensors").rename(recipe.parent / "base/model.safetensors")
    (recipe.parent / "models").rename(own / "models")
    (own / "recipe.yaml").write_text(yaml.safe_dump(content))
    run("compress", "--config", own / "recipe.yaml")
    assert fusionkit.Bundle.load(elsewhere / "made/bundle").tasks == TASKS


def test_the_working_directory_comes_first(recipe: Path, files: Files, elsewhere: Path) -> None:
    """Where the recipe's folder has nothing; of two the one is not guessed."""
    local(recipe, files)
    (recipe.parent / "models").rename(elsewhere / "models")
    run("compress", "--config", recipe)
    (recipe.parent / "models").mkdir()
    (recipe.parent / "models/base.safetensors").write_bytes(b"another")
    said = run("compress", "--config", recipe, "--overwrite", code=1)
    assert "model.base: ./models/base.safetensors is there twice" in said
    assert "write the one that is meant as an absolute path" in said


def test_names_beside_the_recipe_are_no_paths(recipe: Path, elsewhere: Path) -> None:
    """Only what has a `/` is one: an id, a task or a dtype may be a file's name, too."""
    (recipe.parent / "emr").mkdir()
    content = yaml.safe_load(recipe.read_text())
    content["model"]["codec"] = "emr"
    recipe.write_text(yaml.safe_dump(content))
    run("compress", "--config", recipe)


@pytest.mark.slow
def test_modules_of_both_folders_can_be_imported(recipe: Path, tmp_path: Path) -> None:
    """By the installed program: of the recipe's folder, and of the working directory."""
    here = tmp_path / "here"
    here.mkdir()
    (here / "mine.py").write_text((tmp_path / "tiny.py").read_text())
    content = yaml.safe_load(recipe.read_text().replace("tiny.Data", "mine.Data"))
    del content["model"]["bundle"]
    recipe.write_text(yaml.safe_dump(content))
    done = subprocess.run(
        [PROGRAM, "test", "--config", "../recipe.yaml"],
        cwd=here,
        env={**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr


class TestPieces:
    """A mapping's `piece`: files beside the recipe, under what the recipe says itself."""

    def composed(self, folder: Path, content: str, **pieces: str) -> dict[str, object]:
        (folder / "shared").mkdir(exist_ok=True)
        for name, text in pieces.items():
            (folder / "shared" / f"{name}.yaml").write_text(text)
        path = folder / "r.yaml"
        path.write_text(content)
        return RecipeFile(str(path)).written_out(yaml.safe_load(content))

    def test_own_keys_go_before_at_any_depth(self, tmp_path: Path) -> None:
        found = self.composed(
            tmp_path,
            "codecs: {piece: [shared/few.yaml, shared/more.yaml], B: {init_args: {rank: 4}}, "
            "C: c}\n"
            "list: [{piece: shared/few.yaml}]",
            few="A: {class_path: EMR}\nB: {class_path: SVD, init_args: {rank: 2, dtype: int4}}",
            more="A: {class_path: Dense}",
        )
        svd = {"class_path": "SVD", "init_args": {"rank": 4, "dtype": "int4"}}
        assert found["codecs"] == {"A": {"class_path": "Dense"}, "B": svd, "C": "c"}
        assert list(found["codecs"]) == ["A", "B", "C"]  # type: ignore[call-overload]
        assert found["list"] == [
            {"A": {"class_path": "EMR"}, "B": {**svd, "init_args": {"rank": 2, "dtype": "int4"}}}
        ]

    def test_a_whole_recipe_is_one(self, recipe: Path, elsewhere: Path) -> None:
        """Of another recipe, in another folder: what it reads is found from its own."""
        (recipe.parent / "own").mkdir()
        own = recipe.parent / "own" / "dense.yaml"
        own.write_text("piece: ../recipe.yaml\nmodel: {codec: {class_path: dense}, bundle: there}")
        run("compress", "--config", "../own/dense.yaml")
        assert fusionkit.Bundle.load(elsewhere / "there").codec == fusionkit.Dense()
        run("compress", "--overwrite", "--config", f"../own/{own.name}")

    def test_variables_and_paths_are_the_pieces_own(
        self, tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("NAME", "cats")
        (tmp_path / "shared/rows").mkdir(parents=True)
        (tmp_path / "shared/rows/cats").touch()
        found = self.composed(
            tmp_path,
            "data: {piece: shared/data.yaml}\npublished: [shared/data.yaml]",
            data="tasks: {piece: tasks.yaml}\nsaid: $${NAME}",
            tasks="a: rows/${NAME}",
        )
        assert found == {
            "data": {"tasks": {"a": str(tmp_path / "shared/rows/cats")}, "said": "${NAME}"},
            "published": [str(tmp_path / "shared/data.yaml")],
        }

    def test_variables_are_given(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """They go before the environment's, and hold in pieces of pieces."""
        monkeypatch.setenv("SIZE", "small")
        found = self.composed(
            tmp_path,
            "b: {piece: shared/model.yaml, with: {SIZE: base, WIDTH: 3}}\n"
            "l: {piece: shared/model.yaml, with: {SIZE: large, WIDTH: 4}}",
            model="path: org/${SIZE}-${WIDTH}\ntowers: {piece: towers.yaml}",
            towers="cats: org/${SIZE}_cats",
        )
        assert found == {
            "b": {"path": "org/base-3", "towers": {"cats": "org/base_cats"}},
            "l": {"path": "org/large-4", "towers": {"cats": "org/large_cats"}},
        }

    def test_variables_that_are_not(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"a\.with: no `\${SIEZ}` is in .*one.*'SIZE'\?"):
            self.composed(
                tmp_path,
                "a: {piece: shared/one.yaml, with: {SIEZ: s, SIZE: b}}",
                one="path: ${SIZE}",
            )
        with pytest.raises(UsageError, match=r"a\.with: expected variables .*, got \['SIZE'\]"):
            self.composed(tmp_path, "a: {piece: shared/one.yaml, with: [SIZE]}")
        with pytest.raises(FusionKitError, match=r"'SIZE' is not set; .*\(with: {SIZE: …}\)"):
            self.composed(tmp_path, "a: {piece: shared/one.yaml}")

    @pytest.mark.parametrize(
        ("content", "piece", "said"),
        [
            ("piece: shared/on.yaml", "a: 1", r"piece: no such file: .*on\.yaml .*'one\.yaml'"),
            ("a: {piece: shared/one.yaml}", "[1]", "a.piece: expected a mapping in .*, got list"),
            ("a: {piece: shared/one.yaml}", "a: [", "a.piece: .* is no YAML"),
            (
                "a: {piece: shared/one.yaml}",
                "b: {piece: one.yaml}",
                r"one\.yaml: b.piece: .* itself",
            ),
        ],
    )
    def test_refused(self, tmp_path: Path, content: str, piece: str, said: str) -> None:
        with pytest.raises(UsageError, match=said):
            self.composed(tmp_path, content, one=piece)

    def test_a_key_of_that_name(self, tmp_path: Path) -> None:
        """A task, or a codec's name in a table, may be called so."""
        assert self.composed(tmp_path, "tasks: {piece: data/x}") == {"tasks": {"piece": "data/x"}}
