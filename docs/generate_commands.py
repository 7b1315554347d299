"""Writes docs/commands.md from the command line's own definitions, so that the page cannot disagree with them.

python docs/generate_commands.py            # write it
python docs/generate_commands.py --check    # status 1 where it is out of date
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import click

from toast_onnx_cli.commands import ToastCommand, folded
from toast_onnx_cli.main import SUBCOMMANDS, main

PAGE = Path(__file__).resolve().parent / "commands.md"

INTRODUCTION = """\
<!-- Written by docs/generate_commands.py; edit the commands' own help, not this page. -->

# Commands

Every command prints its result on standard output and its progress on standard error, so `--json` can be piped. Files
appear whole or not at all. `toast-onnx COMMAND --help` says what this page says.

| exit status | meaning |
|---|---|
| 0 | done |
| 1 | an expected failure: one line that starts with `Error:` and says what to do |
| 2 | wrong usage |
| 130 | interrupted |

`toast-onnx -v COMMAND ...` logs what is done, `-vv` every detail; `-q`, before or behind the command, leaves progress
and notes out. `NO_COLOR` is respected, and tables fit terminals from 60 columns on. Every option has a default of the
user's own in `TOAST_COMMAND_OPTION`, as in `TOAST_PRUNE_THREADS=2`.

A model is a file, or `hf:ORG/NAME` of the Hugging Face hub (`hf:ORG/NAME:FILE.onnx` where it holds several graphs) with
the `hub` extra: it is fetched once, with its weights and its preprocessing, and results go to the present folder.

`-` stands for standard input where a ratios file is read (`prune --ratios -`, `calibrate --ratios -`,
`plan --settings -`), and for standard output where a document is written (`prune --report -`, `finetune --report -`,
`plan -o -`); nothing else is printed there then:

```bash
toast-onnx plan model.onnx --data images/ --macs 0.6 -o - > ratios.yaml
toast-onnx presets paper:deit_tiny@0.8 | toast-onnx prune deit_tiny.onnx --ratios -
```

The shell completes commands and options after one of these lines in its start-up file:

```bash
eval "$(_TOAST_ONNX_COMPLETE=bash_source toast-onnx)"            # ~/.bashrc
eval "$(_TOAST_ONNX_COMPLETE=zsh_source toast-onnx)"             # ~/.zshrc
_TOAST_ONNX_COMPLETE=fish_source toast-onnx | source             # ~/.config/fish/config.fish
```
"""


def page() -> str:
    """The whole page as Markdown."""
    context = click.Context(main, info_name="toast-onnx")
    sections = [INTRODUCTION]
    for name in SUBCOMMANDS:
        command = main.get_command(context, name)
        if command is not None:
            sections += sections_of(command, click.Context(command, info_name=name, parent=context))
    return "\n".join(sections)


def sections_of(command: click.Command, context: click.Context) -> list[str]:
    """A command, or every command of a group."""
    if not isinstance(command, click.Group):
        return [section(command, context)]
    inner = [(each, click.Context(each, info_name=name, parent=context)) for name, each in command.commands.items()]
    return [text for each, below in inner for text in sections_of(each, below)]


def section(command: click.Command, context: click.Context) -> str:
    """One command: its usage, what it does, its options."""
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    lines = [
        f"## {context.command_path.partition(' ')[2]}",
        "",
        "```text",
        usage,
        "```",
        "",
        inspect.cleandoc(command.help or ""),
        "",
    ]
    if isinstance(command, ToastCommand):
        shown = [line for example in command.examples for line in folded(f"toast-onnx {example}", 100)]
        lines += ["```bash", *shown, "```", ""]
    lines += ["| option | what it does |", "|---|---|"]
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context) if isinstance(parameter, click.Option) else None
        if record is not None and "--help" not in parameter.opts:
            option, text = (cell.replace("|", r"\|") for cell in record)
            lines.append(f"| `{option}` | {text.strip()} |")
    return "\n".join([*lines, ""])


def run(arguments: list[str]) -> int:
    """Writes or checks the page; returns the exit status."""
    text = page()
    if "--check" not in arguments:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    print("docs/commands.md is out of date: run python docs/generate_commands.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
