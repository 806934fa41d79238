"""`fusionkit codecs`."""

from fusionkit import registry
from fusionkit.cli import report
from fusionkit.cli.arguments import call
from fusionkit.cli.table import Table


def run(args: list[str]) -> None:
    """List the installed codecs and merges."""
    call(codecs, args)


def codecs() -> None:
    """List the installed codecs and merges, where they come from and what they do."""
    failures = registry.load_all()
    for group in registry.GROUPS:
        table = Table(group, ("id", "class", "from", "what it does"), words=4)
        for name in registry.names(group):
            if failure := failures.get(f"{group}:{name}"):
                table.add(name, "", "", f"can't be used: {failure}")
                continue
            plugin = registry.load(group, name)
            what = (plugin.__doc__ or "").strip().splitlines()
            table.add(
                name, plugin.__name__, " ".join(registry.origin(plugin)), what[0] if what else ""
            )
        report.show(table)
