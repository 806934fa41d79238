"""What lies beside weights, changed at random: each is refused by name, or read, in time.

An index of shards, `config.json`, a tokenizer's files, an adapter's config and record, what says
how a model is quantised, the header of a GGUF file, and a manifest's `rename`: a value, a key or a
number set to another, a pattern that takes for ever, JSON without end, bytes, a file cut short.
Then the folder is opened and all that is in it read, an adapter fitted to its base, a bundle
opened. Each must end within two seconds of this process's time in an error that names the folder,
or in tensors. From the folder `tests`:

    python -m faults.side_files [--trials N] [--seed S]
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from faults.campaign import Ended, campaign
from faults.mutations import SLOW, places, spoil
from manifests import edit
from quantized_files import bnb_nf4, packed
from safetensors.torch import load_file, save_file
from tiny_language import causal

from fusionkit import Checkpoint, Dense, Family, compress
from fusionkit.bundles.bundle import Bundle
from fusionkit.errors import FusionKitError
from fusionkit.reuse.beside import config_for, tokenizer
from fusionkit.tasks.class_names import named_classes

FOR_EVER: tuple[Any, ...] = (
    *(
        "(a+)+$",
        "(.*)*(.*)*x",
        "(?:a|a?)+b",
        ".*.*.*.*.*=",
        "(" * 200,
        "a{9999}{9999}",
        "\\1",
        "[[",
    ),
    *(10**9, 10**400, 1e308, [10**9], {"": 10**12}),
)
_TEXTS = (
    *(b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000, b"\xff\xfe{\x00}\x00", b"", b"null", b"[]"),
    *(b'{"model_type": "\\ud800"}', b'{"r": NaN}', b"\xef\xbb\xbf{}", b" " * 100_000 + b"{"),
)


def made(folder: Path) -> dict[str, Path]:
    """What is changed, by its kind: sound, each in a folder of its own."""
    found = {kind: folder / kind for kind in CHANGES}
    model = causal(folder / "whole", hidden_size=32)
    state = Checkpoint.of(model)
    for kind in ("index", "config"):
        shutil.copytree(model, found[kind], ignore=shutil.ignore_patterns("*.safetensors"))
        names, index = sorted(state), {}
        for shard in range(2):
            file = f"model-0000{shard + 1}-of-00002.safetensors"
            save_file({name: state[name] for name in names[shard::2]}, found[kind] / file)
            index |= dict.fromkeys(names[shard::2], file)
        (found[kind] / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    _adapter(model, found["adapter"])
    packed().save(found["quantised"])
    bnb_nf4().save(found["quant state"])
    found["gguf"].mkdir()
    _gguf(state, found["gguf"] / "model.gguf")
    tuned = {name: tensor + 1 for name, tensor in state.items()}
    base = {f"old.{name}": tensor for name, tensor in state.items()}
    save_file(base, folder / "base.safetensors")
    rename = {r"^old\.": ""}
    compress(folder / "base.safetensors", {"x": tuned}, Dense(), found["rename"], rename=rename)
    return found


def _adapter(model: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "o_proj"], rank_pattern={"o_proj": 3}, alpha_pattern={}
    )
    adapted: Any = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    adapted.save_pretrained(folder)
    start = load_file(folder / "adapter_model.safetensors")
    names = {name: name.removeprefix("base_model.model.") for name in start}
    save_file({names[name]: tensor for name, tensor in start.items()}, folder / "start.safetensors")
    (folder / "fusionkit.json").write_text(json.dumps({"start": {"file": "start.safetensors"}}))


def _gguf(state: Checkpoint, path: Path) -> None:
    """A Llama as llama.cpp has it, but for the order of rows."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(state.specs["model.embed_tokens.weight"].shape[0])
    writer.add_context_length(48)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_token_list([f"t{place}" for place in range(40)])
    for name, new in (
        *(("model.embed_tokens", "token_embd"), ("model.norm", "output_norm")),
        *(("lm_head", "output"), ("layers.0.input_layernorm", "attn_norm")),
        *(("layers.0.post_attention_layernorm", "ffn_norm"),),
        *((f"layers.0.self_attn.{x}_proj", f"attn_{x}") for x in "qkv"),
        *((f"layers.0.mlp.{x}_proj", f"ffn_{x}") for x in ("gate", "up", "down")),
        ("layers.0.self_attn.o_proj", "attn_output"),
    ):
        tensor = state[f"{'model.' if name.startswith('layers') else ''}{name}.weight"]
        block = "blk.0." if "layers" in name else ""
        writer.add_tensor(f"{block}{new}.weight", np.ascontiguousarray(tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def of_json(path: Path, draw: random.Random) -> None:
    """A JSON file: one to three of its values, or its text."""
    if draw.random() < 0.15:
        path.write_bytes(draw.choice(_TEXTS))
        return
    content = json.loads(path.read_text())
    for _ in range(draw.choice([1, 1, 2, 3])):
        changed(content, draw)
    path.write_text(json.dumps(content))


def changed(content: Any, draw: random.Random) -> None:
    """One thing in a JSON value."""
    if not places(content):
        return
    if draw.random() < 0.6:
        spoil(content, draw)
        return
    *way, last = draw.choice(places(content))
    inside = content
    for key in way:
        inside = inside[key]
    value = draw.choice(FOR_EVER)
    if isinstance(inside, dict) and isinstance(value, str) and draw.random() < 0.5:
        inside[value] = inside.pop(last)
    else:
        inside[last] = value


def of_state(folder: Path, draw: random.Random) -> None:
    """What bitsandbytes says of a weight, which it keeps among the tensors."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(each for each in tensors if "quant_state" in each)
    content = json.loads(bytes(tensors[name].tolist()))
    changed(content, draw)
    text = draw.choice([json.dumps(content).encode()] * 4 + [*_TEXTS[2:]])
    tensors[name] = torch.tensor(list(text), dtype=torch.uint8)
    save_file(tensors, path)


def of_gguf(folder: Path, draw: random.Random) -> None:
    """Bytes of the header, numbers of 4 or 8 bytes in it, or the end."""
    path = folder / "model.gguf"
    raw = bytearray(path.read_bytes())
    header = raw.index(b"token_embd") + 1000
    way = draw.randrange(4)
    if way == 0:
        raw = raw[: draw.randrange(len(raw))]
    elif way == 1:
        raw[draw.randrange(header)] = draw.randrange(256)
    else:
        size, place = 4 * way - 4, draw.randrange(header)
        number = draw.choice([0, 1, 9, 1 << 20, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 63])
        raw[place : place + size] = (number % (1 << 8 * size)).to_bytes(size, "little")
    path.write_bytes(raw)


def of_rename(folder: Path, draw: random.Random) -> None:
    """The patterns in a manifest, and what they are replaced by."""

    def change(manifest: dict[str, Any]) -> None:
        patterns = manifest["base"]["rename"]
        for _ in range(draw.choice([1, 3])):
            text = [each for each in FOR_EVER if isinstance(each, str)]
            key = draw.choice([*text, r"^old\.", r"(.)", "", ".*"])
            patterns[key] = draw.choice(["", r"\1", r"\1\1", "x" * 4000, r"\g<0>" * 800, "\\"])

    edit(folder, change)


def _one_of(*names: str) -> Callable[[Path, random.Random], None]:
    return lambda folder, draw: of_json(folder / draw.choice(names), draw)


CHANGES: dict[str, Callable[[Path, random.Random], None]] = {
    "index": _one_of("model.safetensors.index.json"),
    "config": _one_of(
        *("config.json", "config.json", "tokenizer.json", "tokenizer_config.json"),
        "generation_config.json",
    ),
    "adapter": _one_of("adapter_config.json", "adapter_config.json", "fusionkit.json"),
    "quantised": _one_of("config.json"),
    "quant state": of_state,
    "gguf": of_gguf,
    "rename": of_rename,
}


def read(kind: str, here: Path, folder: Path) -> None:
    """All that is read of it."""
    if kind == "adapter":
        for adapters in ("merged", "modules"):
            family = Family(folder / "whole", {"x": here}, adapters=adapters)
            for name in family.names("delta"):
                family.tensor("x", name, family.base[name])
    elif kind == "rename":
        bundle = Bundle(here, folder / "base.safetensors")
        bundle.state_dict("x")
    elif kind == "config":
        compress(folder / "whole", {"x": here}, Dense(), here / "b", adapters="merged")
        bundle = Bundle(here / "b", here)
        named_classes(here / "config.json")
        config_for(bundle, "x")
        tokenizer(bundle, "x")
    else:
        path = here / "model.gguf" if kind == "gguf" else here
        for tensor in Checkpoint.of(path, dequantize=kind != "index").values():
            tensor.sum()


def trial(kind: str, start: Path, folder: Path, draw: random.Random) -> tuple[str, str]:
    """One of them: how it ended, and of a fault, what."""
    here = folder / "changed"
    shutil.rmtree(here, ignore_errors=True)
    shutil.copytree(start, here)
    CHANGES[kind](here, draw)
    begun, end = time.process_time(), "read"
    try:
        read(kind, here, folder)
    except FusionKitError as error:
        if str(here) not in str(error):
            return "fault", f"no file is named: {type(error).__name__}: {error}"
        end = "refused"
    except Exception as error:
        return "fault", f"{type(error).__name__}: {error}"
    if (spent := time.process_time() - begun) > SLOW:
        return "fault", f"took {spent:.1f} s"
    return end, ""


def main(trials: int, seed: int) -> int:
    """All of them, and a table; how many faults there were."""
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(temporary)
        sound = made(folder)
        for kind, start in sound.items():  # whose first reading imports
            read(kind, Path(shutil.copytree(start, folder / "first" / kind)), folder)

        def one(draw: random.Random, own: random.Random) -> Ended:
            kind = draw.choice(list(CHANGES))
            end, what = trial(kind, sound[kind], folder, own)
            return Ended(kind, end, kind, what)

        return campaign(trials, seed, CHANGES, ("refused", "read", "fault"), one)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sys.exit(min(main(given.trials, given.seed), 1))
