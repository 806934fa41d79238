"""Which names of a file are one tensor: by the class's word and by bytes, never by name alone."""

import re
from collections.abc import Mapping

from fusionkit.checkpoints.checkpoint import Checkpoint, same_values

_HEAD = re.compile(
    r"(^|\.)(lm_head|embed_out|proj_out|generator_lm_head|output|(cls\.)?predictions\.decoder"
    r"|lm_head\.decoder)\.weight$"
)
_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|wte|shared|word_embeddings|tok_embeddings|embed_in|tokens_embed)\.weight$"
)


def tied_by_bytes(checkpoint: Checkpoint) -> dict[str, str]:
    """A head that is the embedding, to the bit, under a known pair of names.

    For files of which nothing but the tensors is known.

    Returns:
        the head's name → the embedding's.
    """
    heads = [name for name in checkpoint if _HEAD.search(name)]
    embeddings = [name for name in checkpoint if _EMBEDDING.search(name)]
    return {
        head: embedding
        for head in heads
        for embedding in embeddings[:1]
        if head not in checkpoint.aliases and same_values(checkpoint, head, checkpoint, embedding)
    }


def tied_by_class(checkpoint: Checkpoint, declared: Mapping[str, str]) -> dict[str, str]:
    """Of the pairs that a class ties, those that a checkpoint does not hold apart.

    As transformers has it: of two that are there with different values, each keeps its own.

    Args:
        checkpoint: under the class's names.
        declared: tied name → the name whose tensor it shares.

    Returns:
        those of the pairs of which one is missing, or both are equal to the bit.
    """
    return {
        name: target
        for name, target in declared.items()
        if (name in checkpoint or target in checkpoint)
        and (
            name not in checkpoint
            or target not in checkpoint
            or same_values(checkpoint, name, checkpoint, target)
        )
    }
