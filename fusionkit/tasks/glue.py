"""GLUE, a task at a time: what scores it, and how a text-to-text model is asked.

Whatever else speaks of GLUE's tasks takes them from here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fusionkit.errors import FusionKitError, meant

PREFIX = "glue"
"""A metric of this name, or a question, is that of GLUE's task of the same name; `glue:NAME`, where
the task is called otherwise here."""

_CORRECT: Any = "Accuracy"
_BOTH: Any = {
    "metrics": {
        "Accuracy": "Accuracy",
        "F1Score": {"class_path": "F1Score", "init_args": {"task": "binary"}},
    },
    "counts": "Accuracy",
}
_CORRELATIONS: Any = {
    "metrics": {
        "mean": None,  # of the two, which is what the kind of task has
        "PearsonCorrCoef": "PearsonCorrCoef",
        "SpearmanCorrCoef": "SpearmanCorrCoef",
    },
    "counts": "mean",
}


@dataclass(frozen=True)
class GlueTask:
    """One of GLUE's tasks.

    Attributes:
        metric: what scores it; see `fusionkit.tasks.metrics.MetricChoice`. Of accuracy and F1,
            accuracy counts.
        prompt: what a text-to-text model is asked, as the Flan-T5 checkpoints of FusionBench were
            (spelt as there); with the columns of a row in braces.
        words: what it answers, class by class; empty where it answers by a number.
    """

    metric: Any
    prompt: str
    words: tuple[str, ...] = ()


_YES_OR_NO = "Answere with 'yes' or 'no'."
GLUE: Mapping[str, GlueTask] = {
    "cola": GlueTask(
        "MatthewsCorrCoef",
        "Indicate if the following sentence is grammatically correct or not: "
        "\"{sentence}\". Answere 'acceptable' or 'unacceptable'.",
        ("unacceptable", "acceptable"),
    ),
    "sst2": GlueTask(
        _CORRECT,
        "Given the sentence '{sentence}', determine the sentiment. Is it positive or negative?",
        ("negative", "positive"),
    ),
    "mrpc": GlueTask(
        _BOTH,
        "Are the following sentences '{sentence1}' and '{sentence2}' conveying the same meaning? "
        + _YES_OR_NO,
        ("no", "yes"),
    ),
    "stsb": GlueTask(
        _CORRELATIONS,
        "Consider the sentences '{sentence1}' and '{sentence2}'. On a scale from 1 (completely "
        "different) to 5 (completely similar), rate the similarity.",
    ),
    "qqp": GlueTask(
        _BOTH,
        "Do the questions '{question1}' and '{question2}' have the same intent? " + _YES_OR_NO,
        ("no", "yes"),
    ),
    "mnli": GlueTask(
        _CORRECT,
        "Does the premise: '{premise}' logically imply, contradict, or is neutral to the "
        "hypothesis: '{hypothesis}'? Answere with 'entailment', 'contradiction', or 'neutral'.",
        ("entailment", "neutral", "contradiction"),
    ),
    "qnli": GlueTask(
        _CORRECT,
        "Given the context: '{sentence}', does the question '{question}' have an answer based on "
        "the information provided? Answer with 'yes' or 'no'.",
        ("yes", "no"),
    ),
    "rte": GlueTask(
        _CORRECT,
        "Does the text: '{sentence1}' entail that '{sentence2}' is true? Provide 'yes' or 'no'.",
        ("yes", "no"),
    ),
}


def is_glue(choice: Any) -> bool:
    """Whether a setting means GLUE's: `glue`, or `glue:NAME`."""
    return isinstance(choice, str) and choice.partition(":")[0] == PREFIX


def glue_task(choice: str, task: str) -> GlueTask:
    """One of GLUE's tasks.

    Args:
        choice: `glue`, or `glue:NAME`.
        task: how the task is called here, which is its name where none is given: `sst2`, `SST-2`,
            `mnli_matched`, ….

    Raises:
        FusionKitError: GLUE has no such task.
    """
    name = choice.partition(":")[2] or task
    plain = name.lower().replace("-", "").replace("_", "")
    plain = plain.removesuffix("mismatched").removesuffix("matched")
    if plain not in GLUE:
        raise FusionKitError(
            f"task '{task}': GLUE has no task '{name}'{meant(plain, GLUE) or ';'} there is "
            f"{', '.join(GLUE)}; say which it is: {{{task}: {PREFIX}:cola}}, or another metric"
        )
    return GLUE[plain]
