"""Whether a recipe that was run is the same as one of today."""

from pathlib import Path

import yaml

from fusionkit.cli.earlier import same_recipe


def test_a_base_that_was_written_otherwise(tmp_path: Path) -> None:
    def recipe(kind: str, **settings: object) -> str:
        return yaml.safe_dump({"model": {"base": {"class_path": kind, "init_args": settings}}})

    earlier = tmp_path / "config.yaml"
    earlier.write_text(recipe("fusionkit.checkpoint.Checkpoint", source="x", add_prefix=""))
    for kind in ("fusionkit.Checkpoint", "fusionkit.Checkpoint.of"):
        now = {"source": "x", "add_prefix": "", "variant": None}
        assert same_recipe(earlier, recipe(kind, **now))
        assert not same_recipe(earlier, recipe(kind, **now | {"variant": "fp16"}))
