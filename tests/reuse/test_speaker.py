"""Tasks that answer: the tokens that the exported models generate by transformers alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from talking import LETTERS, TEMPLATE, bundle, tokenizer

import fusionkit
from fusionkit import SVD
from fusionkit.errors import BundleError, FusionKitError
from fusionkit.reuse.speaker import Speaker

KINDS = ("llama, tied", "llama, untied", "gpt2", "t5", "bart")


def exported(source: Any, task: str, folder: Path) -> Any:
    fusionkit.export_task(source, task, folder / f"x-{task}")
    config = transformers.AutoConfig.from_pretrained(folder / f"x-{task}")
    kind = getattr(transformers, config.architectures[0])
    return kind.from_pretrained(folder / f"x-{task}")


@pytest.mark.parametrize("kind", KINDS)
def test_a_switched_model_generates_what_the_exported_one_does(kind: str, tmp_path: Path) -> None:
    source = bundle(kind, tmp_path)
    speaker = Speaker(source, "cats", max_new_tokens=12)
    alone = {task: exported(source, task, tmp_path) for task in source.tasks}
    for task in ("dogs", "cats", "dogs"):
        speaker.switch(task)
        ids = torch.tensor([speaker.tokens("a b c d")])
        wanted = alone[task].generate(ids, max_new_tokens=12, do_sample=False)
        assert torch.equal(speaker.model.generate(ids, max_new_tokens=12, do_sample=False), wanted)
        new = wanted[0] if alone[task].config.is_encoder_decoder else wanted[0][4:]
        text = tokenizer().decode(new, skip_special_tokens=True)
        assert speaker.say(ids[0].tolist()) == text
    assert len({str(m.generate(ids, max_new_tokens=12)) for m in alone.values()}) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_batches_answer_as_one_by_one(kind: str, tmp_path: Path) -> None:
    """Prompts of all lengths, up to one that leaves an answer less room than it may have."""
    speaker = Speaker(bundle(kind, tmp_path), "cats", max_new_tokens=10)
    counts = (1, 5, 3, 28, 2, 9, 22) if kind != "t5" else (1, 5, 3, 12, 2, 9)
    prompts = [speaker.tokens(" ".join((LETTERS * 2)[n : 2 * n])) for n in counts]
    alone = {place: speaker.say(prompt) for place, prompt in enumerate(prompts)}
    assert dict(speaker.answers(prompts, 3)) == alone
    assert kind == "t5" or len(set(alone.values())) > 2  # so small a T5 says one thing


def test_temperature_draws(tmp_path: Path) -> None:
    speaker = Speaker(bundle("gpt2", tmp_path), "cats", max_new_tokens=20, temperature=2.0)
    torch.manual_seed(0)
    found = [speaker.say(speaker.tokens("a b")) for _ in range(3)]
    torch.manual_seed(0)
    assert found == [speaker.say(speaker.tokens("a b")) for _ in range(3)]
    assert len(set(found)) == 3


def test_conversations_follow_the_chat_template(tmp_path: Path) -> None:
    speaker = Speaker(bundle("gpt2", tmp_path, TEMPLATE), None)
    said = [{"role": "user", "content": "b c"}, {"role": "assistant", "content": "d"}]
    assert speaker.tokenizer.decode(speaker.tokens(said)) == "u b c a d z"
    with pytest.raises(FusionKitError, match=r"chat template can't write these messages"):
        speaker.tokens([{"text": "b"}])


def test_a_task_has_its_own_tokenizer_and_a_common_one_is_kept(tmp_path: Path) -> None:
    bundle("gpt2", tmp_path)
    tokenizer(TEMPLATE).save_pretrained(tmp_path / "dogs")
    tuned = {task: str(tmp_path / task) for task in ("cats", "dogs")}
    source = fusionkit.compress(str(tmp_path / "base"), tuned, SVD(6), tmp_path / "own.bundle")
    speaker = Speaker(source, None)
    common = speaker.tokenizer
    speaker.switch("cats")
    assert speaker.tokenizer is common
    speaker.switch("dogs")
    assert speaker.has_template
    speaker.switch("cats")
    assert not speaker.has_template


def test_what_can_not_answer_is_told(tmp_path: Path) -> None:
    source = bundle("llama, tied", tmp_path / "1")
    speaker = Speaker(source, "cats")
    with pytest.raises(FusionKitError, match=r"has 32 tokens, and the model's context is 32"):
        speaker.tokens(" ".join("a" * 32))
    with pytest.raises(FusionKitError, match="the prompt is empty"):
        speaker.tokens("")
    with pytest.raises(FusionKitError, match="the tokenizer of task 'cats' has no chat template"):
        speaker.tokens([{"role": "user", "content": "a"}])
    with pytest.raises(BundleError, match="has no task 'birds'"):
        speaker.switch("birds")
    assert speaker.task == "cats"
    with pytest.raises(FusionKitError, match=r"BertForMaskedLM can't generate text"):
        Speaker(bundle("bert, tied", tmp_path / "2"), "cats")
    with pytest.raises(BundleError, match="task 'cats' has no tokenizer: none of tokenizer"):
        Speaker(bundle("gpt2", tmp_path / "3", tokens=False), "cats")
    with pytest.raises(FusionKitError, match="expected max_new_tokens of at least 1"):
        Speaker(source, "cats", max_new_tokens=0)
