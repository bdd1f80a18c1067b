"""Shell completion for bash, zsh and fish: scripts made from the commands' own parsers."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scone.utils.command_line import did_you_mean
from scone.utils.errors import SconeError


@dataclass(frozen=True)
class Flag:
    """A flag of a command: its name with dashes, one line of help, and its values where they are a fixed few."""

    name: str
    help: str
    choices: tuple[str, ...] = ()


def completion_script(shell: str, verbs: Mapping[str, str], flags: Mapping[str, Sequence[Flag]]) -> str:
    """A script that the shell reads; ``verbs`` and ``flags`` are by command. Raises SconeError for another shell."""
    if shell not in SHELLS:
        advice = did_you_mean(shell, SHELLS) or f"expected {', '.join(SHELLS)}"
        raise SconeError(f'found the shell {shell!r}; {advice}; write for example: eval "$(scone completion bash)"')
    return SHELLS[shell](verbs, flags)


def _bash(verbs: Mapping[str, str], flags: Mapping[str, Sequence[Flag]]) -> str:
    cases = []
    for verb, known in flags.items():
        names = " ".join(flag.name for flag in known)
        values = "".join(
            f"            {flag.name}) words={shlex.quote(' '.join(flag.choices))} ;;\n"
            for flag in known
            if flag.choices
        )
        cases.append(
            f'    {verb})\n        words={shlex.quote(names)}\n        case "$before" in\n{values}'
            f'            --*) [[ "$word" == -* ]] || words= ;;\n        esac ;;\n'
        )
    return f"""# bash completion of scone; to use it: eval "$(scone completion bash)"
_scone() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" words=
    if (( COMP_CWORD == 1 )); then
        COMPREPLY=($(compgen -W {shlex.quote(" ".join(verbs))} -- "$word"))
        return
    fi
    case "${{COMP_WORDS[1]}}" in
{"".join(cases)}    esac
    COMPREPLY=($(compgen -W "$words" -- "$word"))
    if [[ ${{#COMPREPLY[@]}} -eq 0 && "$word" != -* ]]; then COMPREPLY=($(compgen -f -- "$word")); fi
}}
complete -o filenames -F _scone scone
"""


def _zsh(verbs: Mapping[str, str], flags: Mapping[str, Sequence[Flag]]) -> str:
    commands = "\n".join(f"        {shlex.quote(f'{verb}:{line}')}" for verb, line in verbs.items())
    cases = []
    for verb, known in flags.items():
        specs = [
            f"{flag.name}[{_zsh_text(flag.help)}]:value:"
            + (f"({' '.join(flag.choices)})" if flag.choices else "_files")
            for flag in known
        ]
        lines = " \\\n".join(f"            {shlex.quote(spec)}" for spec in [*specs, "*:file:_files"])
        cases.append(f"    {verb})\n        _arguments \\\n{lines} ;;\n")
    return f"""#compdef scone
# zsh completion of scone; to use it: eval "$(scone completion zsh)"
_scone() {{
    local -a commands
    commands=(
{commands}
    )
    if (( CURRENT == 2 )); then
        _describe command commands
        return
    fi
    local verb="$words[2]"
    shift words
    (( CURRENT-- ))
    case "$verb" in
{"".join(cases)}    esac
}}
compdef _scone scone
"""


def _fish(verbs: Mapping[str, str], flags: Mapping[str, Sequence[Flag]]) -> str:
    lines = ["# fish completion of scone; to use it: scone completion fish | source", "complete -c scone -f"]
    for verb, line in verbs.items():
        lines.append(f"complete -c scone -n __fish_use_subcommand -a {verb} -d {shlex.quote(line)}")
    for verb, known in flags.items():
        for flag in known:
            values = f" -x -a {shlex.quote(' '.join(flag.choices))}" if flag.choices else " -r -F"
            lines.append(
                f"complete -c scone -n '__fish_seen_subcommand_from {verb}' -l {flag.name.removeprefix('--')}"
                f"{values} -d {shlex.quote(flag.help)}"
            )
    return "\n".join(lines) + "\n"


def _quoted(words: Sequence[str]) -> str:
    return shlex.quote(" ".join(words))


def _zsh_text(text: str) -> str:
    """Help inside the brackets of a zsh argument's description."""
    return "".join(f"\\{letter}" if letter in "[]:\\" else letter for letter in text)


SHELLS = {"bash": _bash, "zsh": _zsh, "fish": _fish}
