"""`fusionkit codecs`: the list imports no codec, unless its source does not say what it is."""

from contextlib import suppress
from inspect import getdoc

from fusionkit import registry
from fusionkit.cli.plugin_source import summary_in_source
from fusionkit.cli.table import Table
from fusionkit.cli.terminal import show
from fusionkit.errors import PluginError


def run(args: list[str]) -> None:
    """List the installed codecs and merges, or say all of one."""
    if not args:
        codecs()
    elif args[0].startswith("-"):
        from fusionkit.cli.arguments import call

        call(codecs, args)
    else:
        print(told(_named(args[0])))


def codecs() -> None:
    """List the installed codecs and merges, where they come from and what they do."""
    for group in registry.GROUPS:
        table = Table(group, ("id", "class", "from", "what it does"), words=4)
        for name in registry.names(group):
            table.add(name, *_row(group, name))
        show(table)
    show("of one, its settings and how to use it: fusionkit codecs ID")


def _named(name: str) -> type[registry.Plugin]:
    """A codec, or a merge, by its id, class or path."""
    codecs, merges = registry.GROUPS
    try:
        return registry.named(codecs, name)
    except PluginError as error:
        with suppress(PluginError):
            return registry.named(merges, name)
        raise error from None


def _row(group: str, name: str) -> tuple[str, str, str]:
    """Of one: its class, where it comes from, what it does, or why it can't be used."""
    try:
        point = registry.entry_point(group, name)
        what, class_name = summary_in_source(point), point.attr
        if what is None:
            plugin = registry.load(group, name)
            what, class_name = (getdoc(plugin) or "").partition("\n")[0], plugin.__name__
    except PluginError as error:
        return "", "", f"can't be used: {error}"
    return class_name, " ".join(registry.distribution_of(point)), what


def told(plugin: type[registry.Plugin]) -> str:
    """All of one codec or merge: what it does, its settings, what a task takes, how to ask for it.

    Args:
        plugin: its class.
    """
    from fusionkit.cli.help import options_help

    what = (getdoc(plugin) or "").partition("\nArgs:")[0].strip()
    cost = getattr(plugin, "cost", "")
    asked = _asked_for(plugin)
    lines = [
        f"{plugin.__name__} ({plugin.id}), of {' '.join(registry.origin(plugin))}",
        "",
        what,
        "",
        "settings:",
        *options_help(plugin, {"codec"}),
        *(["", f"a task takes: {cost}"] if cost else []),
        "",
        *asked,
    ]
    return "\n".join(lines)


def _asked_for(plugin: type[registry.Plugin]) -> list[str]:
    """How a command line and a recipe have it; a merge as the setting of a codec."""
    from fusionkit.cli.line import DEFAULT_CODEC
    from fusionkit.cli.named_codec import CODECS, class_path

    own = ["  model:", "    codec:"]
    if plugin.group == CODECS:
        named = "" if plugin.id == DEFAULT_CODEC else f" --codec {plugin.id}"
        named += " [--SETTING VALUE…]"
    else:
        named = f" --codec merged --merge {plugin.id} [--merge.SETTING VALUE…]"
        own += ["      class_path: fusionkit.Merged", "      init_args:", "        merge:"]
    inside = " " * (len(own[-1]) - len(own[-1].lstrip()) + 2)
    return [
        f"on the command line: fusionkit compress BASE FINETUNED…{named}",
        "in a recipe:",
        *own,
        f"{inside}class_path: {class_path(plugin)}",
        f"{inside}init_args: {{SETTING: VALUE}}",
    ]
