"""Write TIES-Merging's (IA)³ vectors as a folder that PEFT, and so FusionKit, reads.

python ia3_as_peft.py rte.pt models/ia3/rte
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

CONFIG = {
    "peft_type": "IA3",
    "task_type": "SEQ_2_SEQ_LM",
    "base_model_name_or_path": "bigscience/T0_3B",
    "target_modules": ["k", "v", "wi_1"],
    "feedforward_modules": [],  # wi_1 is scaled behind it, as k and v are
    "inference_mode": True,
}


def main(source: str, folder: str) -> None:
    """Read `MODULE.ia3_vector`, `(d,)`, of a PyTorch file; write `MODULE.ia3_l`, `(d, 1)`."""
    state = torch.load(source, map_location="cpu", weights_only=True)
    tensors = {}
    for name, value in state.items():
        module, _, kind = name.removeprefix("transformer.").rpartition(".")
        if kind != "ia3_vector":
            sys.exit(f"{source}: expected vectors called MODULE.ia3_vector alone, got '{name}'")
        tensors[f"base_model.model.{module}.ia3_l"] = value.reshape(-1, 1).contiguous()
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(tensors, Path(folder) / "adapter_model.safetensors", {"format": "pt"})
    (Path(folder) / "adapter_config.json").write_text(json.dumps(CONFIG, indent=2))


if __name__ == "__main__":
    main(*sys.argv[1:3])
