"""``minflash completion``: the script by which bash completes commands, options, their values."""

from __future__ import annotations

import argparse

EPILOG = """examples:
  eval "$(minflash completion)"                    # for this shell; in ~/.bashrc, for all
"""
_SCRIPT = """\
_minflash() {
  local words= current=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]}
  if [ "$COMP_CWORD" -eq 1 ]; then
    words="%s"
  else
    case "${COMP_WORDS[1]} $before $current" in
%s
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}
complete -o default -F _minflash minflash  # default: names of files where no word fits
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``minflash completion`` has no options of its own."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


def run(args: argparse.Namespace) -> int:
    """Prints the script."""
    from .cli import _parser

    print(script(_parser()), end="")
    return 0


def script(parser: argparse.ArgumentParser) -> str:
    """The script for a parser with commands, written from what the parser declares."""
    commands: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            commands = action.choices
    first = [*commands, *_options(parser)]
    cases = [case for name, command in commands.items() for case in _cases(name, command)]
    return _SCRIPT % (" ".join(first), "\n".join(cases))


def _cases(name: str, command: argparse.ArgumentParser) -> list[str]:
    """Lines of bash's ``case``: values of an option, then options, then what has fixed values."""
    cases = []
    for action in command._actions:
        words = " ".join(map(str, action.choices or ()))
        if action.option_strings and action.nargs != 0:
            patterns = "|".join(f'"{name} {option} "*' for option in action.option_strings)
            cases.append(f'      {patterns}) words="{words}" ;;')
    cases.append(f'      "{name} "*" -"*) words="{" ".join(_options(command))}" ;;')
    for action in command._actions:
        if not action.option_strings and action.choices:
            words = " ".join(map(str, action.choices))
            cases.append(f'      "{name} {name} "*) words="{words}" ;;')
    return cases


def _options(parser: argparse.ArgumentParser) -> list[str]:
    return [option for action in parser._actions for option in action.option_strings]
