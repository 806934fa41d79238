"""`fusionkit test`."""

from fusionkit.bundles.bundle import Bundle
from fusionkit.cli.recipe import RecipeCLI
from fusionkit.tasks.scores import Scores


class TestCLI(RecipeCLI):
    """Score every task of the recipe, from its bundle or compressed on the fly."""

    verb = "test"
    __test__ = False  # not a test case, whatever pytest thinks of the name

    def test(self) -> Scores:
        """Evaluate; the results are for the caller to show."""
        self.save_config()
        return self.evaluate()

    def title(self) -> str:
        """What was evaluated."""
        source = self.model.source
        return repr(source.codec) if isinstance(source, Bundle) else "fine-tuned, uncompressed"
