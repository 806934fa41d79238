"""`fusionkit validate`: as `fusionkit test`, of the validation rows."""

from fusionkit.cli.test import Stage, TestCLI, score


def run(args: list[str]) -> None:
    """Score every task on its validation rows; writes scores.csv and scores.json to `--out`."""
    score(ValidateCLI, args)


class ValidateCLI(TestCLI):
    """Score every task on its validation rows, which are some of its training rows."""

    verb = "validate"
    stage: Stage = "validate"
