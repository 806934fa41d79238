"""`fusionkit --completion bash|zsh`: a script by which a shell completes verbs, options and values.

It offers what each verb's help lists, so that the shell starts nothing to complete a word. Who
installs a codec, or a newer FusionKit, writes it anew.
"""

import io
import re
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout, suppress
from importlib import import_module

from fusionkit import registry
from fusionkit.errors import PluginError, UsageError

_OPTION = re.compile(r"(--[a-z]\w*(?:\.\w+)*)(?: \{?(\w+(?:[|,]\w+)+)\}?)?")
_TAKE_SETTINGS = ("compress", "test", "compare")
"""Verbs whose options a codec's settings may be."""
_TAKE_CODECS = ("codecs", "--codec", "--codecs", "--model.codec")

_BASH = """\
# fusionkit --completion bash > ~/.local/share/bash-completion/completions/fusionkit
_fusionkit() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} offers=
    COMPREPLY=()
    if [ "$COMP_CWORD" = 1 ]; then
        COMPREPLY=($(compgen -W "{verbs}" -- "$word"))
        return
    fi
    case $before in
{values}
    esac
    if [ -z "$offers" ] && [[ $word == -* ]]; then
        case ${{COMP_WORDS[1]}} in
{options}
        esac
    fi
    if [ -n "$offers" ]; then
        COMPREPLY=($(compgen -W "$offers" -- "$word"))
    else
        COMPREPLY=($(compgen -f -- "$word"))
    fi
}}
complete -o filenames -F _fusionkit fusionkit
"""
_ZSH = """\
#compdef fusionkit
# fusionkit --completion zsh > ~/.zfunc/_fusionkit, with fpath+=~/.zfunc before compinit
_fusionkit() {{
    local offers=
    if (( CURRENT == 2 )); then
        offers="{verbs}"
    else
        case ${{words[CURRENT-1]}} in
{values}
        esac
        if [[ -z $offers && ${{words[CURRENT]}} == -* ]]; then
            case ${{words[2]}} in
{options}
            esac
        fi
    fi
    if [[ -n $offers ]]; then
        compadd -- ${{=offers}}
    else
        _files
    fi
}}
if [[ $funcstack[1] == _fusionkit ]]; then
    _fusionkit "$@"
else
    compdef _fusionkit fusionkit
fi
"""
_SCRIPTS = {"bash": _BASH, "zsh": _ZSH}


def run(args: list[str]) -> None:
    """Print the script of a shell; the verbs follow its name."""
    shell, *verbs = args
    print(script(shell, verbs), end="")


def script(shell: str, verbs: Sequence[str]) -> str:
    """The script that a shell reads.

    Args:
        shell: bash or zsh.
        verbs: all verbs.

    Raises:
        UsageError: of another shell nothing is known.
    """
    if shell not in _SCRIPTS:
        raise UsageError(f"--completion: expected {' or '.join(_SCRIPTS)}, got '{shell}'")
    settings = _settings()
    helps = {verb: _help(verb) + settings * (verb in _TAKE_SETTINGS) for verb in verbs}
    codecs = " ".join(registry.names(registry.GROUPS[0]))
    values = dict.fromkeys(_TAKE_CODECS, codecs)
    for text in helps.values():
        for name, said in _OPTION.findall(text):
            if said:
                values.setdefault(name, re.sub("[|,]", " ", said))
    options = {verb: " ".join(_options(text)) for verb, text in helps.items()}
    return _SCRIPTS[shell].format(
        verbs=" ".join([*helps, "help", "--help", "--version", "--completion"]),
        values=_cases({**values, "--completion": " ".join(_SCRIPTS)}),
        options=_cases(options),
    )


def _help(verb: str) -> str:
    """All of a verb's help: of a line, and of a recipe."""
    text = io.StringIO()
    for asked in ("--help", "--help-all"):
        with redirect_stdout(text), suppress(SystemExit):
            import_module(f"fusionkit.cli.{verb}").run([asked])
    return text.getvalue()


def _settings() -> str:
    """What is told of every codec."""
    told = import_module("fusionkit.cli.codecs").told
    texts = []
    for name in registry.names(registry.GROUPS[0]):
        with suppress(PluginError):
            texts.append(told(registry.load(registry.GROUPS[0], name)))
    return "\n".join(texts)


def _options(text: str) -> list[str]:
    return sorted({name for name, _ in _OPTION.findall(text)})


def _cases(offers: Mapping[str, str]) -> str:
    return "\n".join(f'        {name}) offers="{words}" ;;' for name, words in offers.items())
