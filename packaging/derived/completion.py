"""Completions for bash and zsh: commands, options and fixed words are in them, files and users are the shell's.

Static text, so that completing starts no Python. Called by the command line of this package.
"""

from __future__ import annotations

from typing import List, Sequence

from derived.commands import Argument, Program


def bash(program: Program) -> str:
    """A script for bash-completion's directory of completions."""
    name = program.name
    lines = [
        f"# bash completion for {name}: made from its own parser.",
        "# shellcheck shell=bash",
        "",
        f"_{name}()",
        "{",
        "    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]} command='' options='' operands=0 i",
        "    # --option=VALUE comes as three words.",
        "    if [[ $cur == = ]]; then",
        "        cur=''",
        "    elif [[ $prev == = ]]; then",
        "        prev=${COMP_WORDS[COMP_CWORD - 2]}",
        "    fi",
        "    COMPREPLY=()",
        "    for ((i = 1; i < COMP_CWORD; i++)); do",
        "        case ${COMP_WORDS[i]} in",
        f"            {'|'.join(_valued(program))})",
        "                [[ ${COMP_WORDS[i + 1]} != = ]] || ((i++))",
        "                ((i++)) ;;",
        "            -* | =) ;;",
        "            *) if [[ -z $command ]]; then command=${COMP_WORDS[i]}; else ((operands++)); fi ;;",
        "        esac",
        "    done",
        "    case $command:$prev in",
    ]
    for command in program.commands:
        for option in command.options:
            if option.value:
                pattern = " | ".join(f"{command.name}:{flag}" for flag in option.flags)
                lines.append(f"        {pattern})")
                lines.append(f"            {_bash_values(option)}return ;;")
    lines += ["    esac", "    case $command in"]
    lines.append(f"        '') options='{_flags(program.options)} {' '.join(c.name for c in program.commands)}' ;;")
    for command in program.commands:
        lines.append(f"        {command.name})")
        lines.append(f"            options='{_flags(command.options)}'")
        for position, operand in enumerate(command.operands):
            test = f"((operands {'>=' if operand.repeats else '=='} {position}))"
            lines.append(f"            if {test} && [[ $cur != -* ]]; then {_bash_values(operand)}return; fi")
        lines.append("            ;;")
    lines += ["    esac", _compgen('-W "$options"', "    "), "}", "", f"complete -F _{name} {name}", ""]
    return "\n".join(lines)


def zsh(program: Program) -> str:
    """A function for a directory of zsh's fpath."""
    name = program.name
    lines = [
        f"#compdef {name}",
        f"# zsh completion for {name}: made from its own parser.",
        "",
        f"_{name}() {{",
        "    local curcontext=$curcontext state line",
        "    typeset -A opt_args",
        "    local -a commands",
        "    commands=(",
        *[f"        {_quoted(f'{command.name}:{_zsh_text(command.text)}')}" for command in program.commands],
        "    )",
        "    _arguments -C \\",
        *[f"        {_zsh_argument(option)} \\" for option in program.options],
        "        '1:command:->command' '*::argument:->argument'",
        "    case $state in",
        "        command) _describe -t commands command commands ;;",
        "        argument)",
        "            case $words[1] in",
    ]
    for command in program.commands:
        lines.append(f"                {command.name})")
        lines.append("                    _arguments \\")
        specifications = [_zsh_argument(argument) for argument in command.arguments]
        lines += [f"                        {text} \\" for text in specifications[:-1]]
        lines += [f"                        {specifications[-1]}", "                    ;;"]
    lines += ["            esac", "            ;;", "    esac", "}", "", f'_{name} "$@"', ""]
    return "\n".join(lines)


def _flags(options: Sequence[Argument]) -> str:
    return " ".join(flag for option in options for flag in option.flags)


def _valued(program: Program) -> List[str]:
    everything = [option for command in program.commands for option in command.options]
    flags = {flag for option in (*program.options, *everything) for flag in option.flags if option.value}
    return sorted(flags)


def _compgen(words: str, indent: str = "") -> str:
    return f'{indent}mapfile -t COMPREPLY < <(compgen {words} -- "$cur")'


def _bash_values(argument: Argument) -> str:
    if argument.choices:
        return _compgen(f"-W '{' '.join(argument.choices)}'") + "; "
    if argument.is_file or argument.dest in ("socket", "output"):
        return "compopt -o filenames; " + _compgen("-f") + "; "
    if argument.dest == "user":
        return _compgen("-u") + "; "
    if argument.dest in ("at", "peer", "node"):
        return _compgen("-A hostname") + "; "
    return ""


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _zsh_text(text: str) -> str:
    return text.replace("\\", "\\\\").replace(":", "\\:").replace("[", "\\[").replace("]", "\\]")


def _zsh_values(argument: Argument) -> str:
    if argument.choices:
        return f"({' '.join(argument.choices)})"
    if argument.is_file or argument.dest in ("socket", "output"):
        return "_files"
    if argument.dest == "user":
        return "_users"
    if argument.dest in ("at", "peer", "node"):
        return "_hosts"
    return " "


def _zsh_argument(argument: Argument) -> str:
    text, value = _zsh_text(argument.text), _zsh_text(argument.value) or "value"
    if not argument.flags:
        place = "*" if argument.repeats else ("" if argument.required else ":")
        return _quoted(f"{place}:{value}:{_zsh_values(argument)}")
    after = f":{value}:{_zsh_values(argument)}" if argument.value else ""
    if len(argument.flags) == 1:
        return _quoted(f"{'*' if argument.repeats else ''}{argument.flags[0]}[{text}]{after}")
    # The flags of one option exclude each other; the braces are the shell's, so they stay outside the quotes.
    shared = " ".join(argument.flags)
    return f"{_quoted(f'({shared})')}{{{','.join(argument.flags)}}}{_quoted(f'[{text}]{after}')}"
