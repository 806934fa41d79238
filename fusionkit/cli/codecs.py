"""`fusionkit codecs`."""

from inspect import getdoc

from fusionkit import registry
from fusionkit.cli import report
from fusionkit.cli.arguments import call
from fusionkit.cli.help import options_help
from fusionkit.cli.line import DEFAULT_CODEC
from fusionkit.cli.named_codec import CODECS, class_path
from fusionkit.cli.table import Table


def run(args: list[str]) -> None:
    """List the installed codecs and merges, or say all of one."""
    if args and not args[0].startswith("-"):
        print(told(registry.named(CODECS, args[0])))
    else:
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
    report.show("of one, its settings and how to use it: fusionkit codecs ID")


def told(plugin: type[registry.Plugin]) -> str:
    """All of one codec: what it does, its settings, what a task takes, how it is asked for.

    Args:
        plugin: its class.
    """
    what = (getdoc(plugin) or "").partition("\nArgs:")[0].strip()
    cost = getattr(plugin, "cost", "")
    named = "" if plugin.id == DEFAULT_CODEC else f" --codec {plugin.id}"
    lines = [
        f"{plugin.__name__} ({plugin.id}), of {' '.join(registry.origin(plugin))}",
        "",
        what,
        "",
        "settings:",
        *options_help(plugin, {"codec"}),
        *(["", f"a task takes: {cost}"] if cost else []),
        "",
        f"on the command line: fusionkit compress BASE FINETUNED…{named} [--SETTING VALUE…]",
        "in a recipe:",
        "  model:",
        "    codec:",
        f"      class_path: {class_path(plugin) if plugin.group == CODECS else plugin.id}",
        "      init_args: {SETTING: VALUE}",
    ]
    return "\n".join(lines)
