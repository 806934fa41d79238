"""A language model in two: what is called once, and its head, called on some tokens at a time.

Logits are as many as there are words in the vocabulary, for every token: they may be hundreds of
times as large as what they are computed from.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

PIECE = 1 << 24
"""Logits that are had at once: of 128 tokens, where there are 128 thousand words."""


class SplitModel:
    """One of transformers' language models, whose logits are never there all at once.

    Its stack of layers (`base_model`, or its decoder) is called once, and left with what it says.
    The logits of some tokens are then what the model itself makes of the stack's words for them:
    whatever else it does after the head (scaling, softcapping, a bias) is done.

    Args:
        model: what is called: the model, or `Reweighted`.
        stack: the part of it that says what the head gets.
        head: the head.
        decodes: it is an encoder-decoder.
    """

    def __init__(
        self, model: Callable[..., Any], stack: nn.Module, head: nn.Module, decodes: bool
    ) -> None:
        self._model, self._stack, self._head, self._decodes = model, stack, head, decodes

    @classmethod
    def of(cls, called: Callable[..., Any]) -> "SplitModel | None":
        """Split a model; None of one that has to be called as a whole.

        It is split if it is a model of transformers, with `get_output_embeddings()` and, beside
        that, a `base_model` or a decoder; and is neither compiled nor sharded, nor moved about by
        accelerate while it is called.
        """
        model: Any = getattr(called, "of", called)
        transformers = sys.modules.get("transformers")
        if transformers is None or not isinstance(model, transformers.PreTrainedModel):
            return None
        head, stack = model.get_output_embeddings(), model.base_model
        decodes = bool(getattr(model.config, "is_encoder_decoder", False))
        if (stack is model) == decodes:  # T5 has no base; OPT goes by its base's decoder
            stack = getattr(stack, "decoder", None if stack is model else stack)
        if not isinstance(stack, nn.Module) or not hasattr(head, "weight"):
            return None
        within = list(stack.modules())
        if any(each is head for each in within) or any(map(_watched, (model, *within, head))):
            return None
        return cls(called, stack, head, decodes)

    @property
    def outside(self) -> set[str]:
        """Names of the model's tensors that are used after the stack, tied ones included."""
        model: Any = getattr(self._model, "of", self._model)
        before = [self._stack, *([model.encoder] if hasattr(model, "encoder") else [])]
        within = {id(tensor) for each in before for tensor in _tensors(each).values()}
        after = {id(tensor) for tensor in _tensors(self._head).values()}
        named = _tensors(model).items()
        return {name for name, each in named if id(each) in after or id(each) not in within}

    def states(self, **inputs: Any) -> Tensor | None:
        """What the stack says of each token: `(B, L, H)`, of the model's dtype.

        Args:
            inputs: what the model is called with.

        Returns:
            None of a model that does not call the stack.
        """
        found: list[Tensor] = []

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            found.append(output[0])
            raise _LeftError

        handle = self._stack.register_forward_hook(leave)
        try:
            self._model(**inputs)
        except _LeftError:
            pass
        finally:
            handle.remove()
        return found[0] if found else None

    def each(self, states: Tensor, function: Callable[[Tensor, slice], Tensor]) -> list[Tensor]:
        """A function of some tokens' logits, for all tokens; its gradient takes no more memory.

        Args:
            states: what the stack says of tokens: `(N, H)`.
            function: gets logits `(n, vocabulary)`, and which of the tokens they are of. It is
                called again on the way back, and has to say the same.

        Returns:
            what it says, in order.
        """
        size = max(PIECE // len(cast(Tensor, self._head.weight)), 1)

        def say(piece: Tensor, where: slice) -> Tensor:
            return function(self.logits(piece), where)

        found = []
        for start in range(0, len(states), size):
            where = slice(start, min(start + size, len(states)))
            if torch.is_grad_enabled():
                said = checkpoint(
                    say, states[where], where, use_reentrant=False, preserve_rng_state=False
                )
            else:
                said = say(states[where], where)
            found.append(said)
        return found

    def nats(self, states: Tensor, targets: Tensor) -> Tensor:
        """What each token takes, −ln p: float32 `(N,)`.

        Args:
            states: what the stack says before each: `(N, H)`.
            targets: the tokens, int64 `(N,)`.
        """

        def taken(logits: Tensor, where: slice) -> Tensor:
            own = logits.to(torch.float32)
            return nn.functional.cross_entropy(own, targets[where], reduction="none")

        nothing = states.new_zeros(0, dtype=torch.float32)
        return torch.cat([nothing, *self.each(states, taken)])

    def logits(self, states: Tensor) -> Tensor:
        """The logits of tokens `(N, H)`: `(N, vocabulary)`."""
        words = states.new_zeros((1, len(states)), dtype=torch.int64)
        inputs = {"input_ids": words}
        if self._decodes:
            from transformers.modeling_outputs import BaseModelOutput

            read: Any = BaseModelOutput(last_hidden_state=cast(Any, states[None]))
            inputs = {"encoder_outputs": read, "decoder_input_ids": words}
        with _saying(self._stack, states[None]):
            logits: Tensor = self._model(**inputs).logits
        return logits[0]


class _LeftError(Exception):
    """No error: the stack has said what it had to say."""


class _Said:
    """A stack's output that has the last layer's states, and nothing else."""

    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states

    def __getitem__(self, place: int) -> Tensor | None:
        return self.last_hidden_state if place == 0 else None

    def __getattr__(self, name: str) -> None:
        return None


@contextmanager
def _saying(stack: nn.Module, states: Tensor) -> Iterator[None]:
    """Let a stack say what is given, whatever it is called with."""
    stack.forward = lambda *_, **__: _Said(states)
    try:
        yield
    finally:
        del stack.forward


def _watched(module: nn.Module) -> bool:
    """Whether a module must not be left half-way: compiled, sharded by FSDP, or accelerate's."""
    compiled = getattr(module, "_compiled_call_impl", None) is not None
    return compiled or hasattr(module, "unshard") or "forward" in vars(module)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters and buffers by name, tied ones under each of theirs."""
    parameters = module.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(module.named_buffers(remove_duplicate=False))}
