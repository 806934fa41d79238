"""`fusionkit push`."""

from fusionkit.bundles.bundle import Bundle
from fusionkit.bundles.hub import name_of
from fusionkit.bundles.model_card import Scores
from fusionkit.cli import report
from fusionkit.cli.arguments import call
from fusionkit.errors import UsageError
from fusionkit.tasks.score_file import shown_scores


def run(args: list[str]) -> None:
    """Put a bundle on the Hugging Face Hub, with a model card, in one commit."""
    call(push, args, positional="bundle", several="name")


def push(
    bundle: str,
    name: list[str],
    base: str | None = None,
    scores: str | None = None,
    private: bool = False,
    message: str = "Upload a FusionKit bundle",
) -> None:
    """Put a bundle on the Hugging Face Hub, with a model card, in one commit.

    Args:
        bundle: the bundle's folder.
        name: the repository, OWNER/NAME; it is made, if there is none.
        base: the base's name on the Hub, OWNER/NAME, if the bundle was not made from there.
        scores: a scores.json of 'fusionkit test' of the bundle, for the card's table.
        private: a repository that is made is private.
        message: of the commit.
    """
    if len(name) != 1:
        raise UsageError(f"expected one name after the bundle, OWNER/NAME, got {' '.join(name)}")
    opened = Bundle(bundle)
    titles: tuple[str, ...] = ()
    found: Scores | None = None
    if scores is not None:
        titles, found = shown_scores(scores)
    if base is None and name_of(opened.manifest.base.source) is None:
        report.show(
            f"note: the base ({opened.manifest.base.source}) is not on the Hub; whoever uses the "
            "bundle has to give it (`base=`, --base), unless you push with --base OWNER/NAME"
        )
    url = opened.push_to_hub(
        name[0], base_model=base, private=private, titles=titles, scores=found, message=message
    )
    report.show(f"pushed: {url}")
