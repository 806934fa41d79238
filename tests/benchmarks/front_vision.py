"""The front on the demo's vision models, six tasks of a small ViT; they are trained if not there.

    python tests/benchmarks/front_vision.py [folder of results] [folder of trained models]

Writes `compare.csv` of the codecs of front_codecs.yaml, as `fusionkit compare` does.
"""

import sys
from pathlib import Path

import torch

from fusionkit.cli import compare
from fusionkit.cli.demo import prepare
from fusionkit.cli.recipe import quieten, recipes_folder

CODECS = Path(__file__).parent / "front_codecs.yaml"


def main(out: str = "out/front/vision", cache: str = "out/front/models") -> None:
    quieten()
    torch.set_num_threads(1)  # as the demo: such small matrices gain nothing from more
    family = prepare(Path(cache))
    compare.run(
        [
            f"--config={recipes_folder() / 'demo.yaml'}",
            f"--config={CODECS}",
            f"--model.base={family.base}",
            *(f"--model.finetuned.{task}={path}" for task, path in family.full.items()),
            f"--out={out}",
        ]
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
