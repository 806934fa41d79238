"""FusionBench's linearized LoRAs (L-LoRA, 2310.04742): PEFT's config beside a file of its own.

Of each adapted module, `linearized_adapter_model.safetensors` has the factors as they were trained,
`….model.lora_A.default.weight`, and as they started, `….params0_values.N`, N counting the module's
parameters as the factors stand among them.
"""

import re
from collections.abc import Iterable

from fusionkit.errors import CheckpointError

FILE = "linearized_adapter_model.safetensors"
_TRAINED = re.compile(r"(.+)\.model\.(.+)\.default(\..+)")
_STARTED = re.compile(r"(.+)\.params0_values\.(\d+)")


def factor_names(names: Iterable[str], label: str) -> tuple[dict[str, str], dict[str, str]]:
    """The factors as PEFT calls them → what they are called in the file; and those at the start.

    Args:
        names: of the file's tensors.
        label: how messages call it.

    Raises:
        CheckpointError: it is no such file, or a module's factors are not all there.
    """
    trained: dict[str, list[str]] = {}
    started: dict[str, list[tuple[int, str]]] = {}
    called: dict[str, str] = {}
    initial: dict[str, str] = {}
    for name in names:
        if match := _STARTED.fullmatch(name):
            started.setdefault(match[1], []).append((int(match[2]), name))
        elif match := _TRAINED.fullmatch(name):
            called[name] = f"{match[1]}.{match[2]}{match[3]}"
            trained.setdefault(match[1], []).append(name)
        else:
            raise CheckpointError(f"{label}: has '{name}', which is no factor of a linearized LoRA")
    for module in sorted(trained.keys() | started.keys()):
        own, start = sorted(trained.get(module, ())), sorted(started.get(module, ()))
        if len(own) != len(start):
            raise CheckpointError(
                f"{label}: of '{module}' it has {len(own)} factors, and {len(start)} that they "
                "started at; fetch it again"
            )
        initial |= {called[name]: at for name, (_, at) in zip(own, start, strict=True)}
    return {new: name for name, new in called.items()}, initial
