"""How is the command line read, and how is its help written?"""

import argparse
import re
import shutil
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, fields, is_dataclass
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pydantic.dataclasses import is_pydantic_dataclass

from detoxrl import __version__
from detoxrl.config.edit import flatten, takes_list
from detoxrl.config.names import did_you_mean, did_you_mean_setting
from detoxrl.config.schema import Config
from detoxrl.errors import InputError, require

_HELP_COLUMN = 34
_TYPE_NAMES = {bool: "BOOL", int: "INT", float: "FLOAT", str: "TEXT", NoneType: "None"}


@dataclass(frozen=True)
class Option:
    """A flag and its value, in the terms of argparse. Without a metavar it is a switch."""

    flag: str
    help: str
    _: KW_ONLY
    metavar: str | None = None
    parse: Callable[[str], Any] = str
    nargs: str | None = None
    # "extend" collects the values of a flag that is given several times; "store" takes the last one.
    action: str = "store"
    # The flag that sets a boolean setting to False; the setting's own flag takes an optional value.
    off_flag: str | None = None

    @property
    def name(self) -> str:
        """The name of the option's value: "run_dir" for --run-dir, "rl.kl_coef" for --rl.kl-coef."""
        return self.flag.removeprefix("--").replace("-", "_")

    @property
    def flags(self) -> list[str]:
        return [self.flag, self.off_flag] if self.off_flag else [self.flag]

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        if self.off_flag:
            parser.add_argument(self.flag, dest=self.name, nargs="?", const=True)
            parser.add_argument(self.off_flag, dest=self.name, action="store_false")
        elif self.metavar is None:
            parser.add_argument(self.flag, dest=self.name, action="store_true")
        else:
            parser.add_argument(self.flag, dest=self.name, action=self.action, nargs=self.nargs, type=self.parse)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What one command line asks for: only what was given is in here."""

    command: "Command"
    positionals: tuple[str, ...]
    settings: dict[str, Any]
    options: dict[str, Any]

    @property
    def target(self) -> str:
        """The recipe, run folder or source that the command is about; "" if none was given."""
        return self.positionals[0] if self.positionals else ""


@dataclass(frozen=True, kw_only=True)
class Command:
    """A row of the table of commands. `execute` does what the command is for."""

    name: str
    summary: str
    execute: Callable[[Request], None]
    positionals: tuple[str, ...] = ()
    # What any number of words before, between and behind the flags are. Such a command has no other positionals.
    repeated: str = ""
    options: tuple[Option, ...] = ()
    takes_settings: bool = False
    details: str = ""

    @property
    def usage(self) -> str:
        repeated = (f"[{self.repeated} ...]",) if self.repeated else ()
        return " ".join(("detoxrl", self.name, *self.positionals, *repeated))


def parse(command: Command, words: Sequence[str]) -> Request:
    """Return what the words after `detoxrl COMMAND` ask for. Raises InputError for an unknown flag or a stray word."""
    options = list(command.options)
    if command.takes_settings:
        for section in _setting_options(Config(recipe="any")).values():
            options.extend(section)

    # argparse misreads -- behind a flag, so a command with repeated words is given only what stands before it.
    last_words: Sequence[str] = ()
    if command.repeated:
        words, last_words = _split_at_dashes(words)

    parser = _parser(command, options)
    try:
        parsed, unread = parser.parse_known_args(_join_negative_values(words, options))
    except argparse.ArgumentError as error:
        raise InputError(str(error.argument_name), "", error.message, f"see `{parser.prog} --help`") from None
    refused = [word for word in unread if _is_flag(word) or not command.repeated]
    if refused:
        _refuse(refused[0], command, options)

    given = vars(parsed)
    positionals = [given.pop(name) for name in command.positionals if name in given]
    names = flatten(asdict(Config(recipe="any")))
    return Request(
        command=command,
        positionals=(*positionals, *unread, *last_words),
        settings={name: value for name, value in given.items() if name in names},
        options={name: value for name, value in given.items() if name not in names},
    )


def overview(commands: Iterable[Command]) -> str:
    """Return the help of `detoxrl` itself."""
    rows = [(command.usage, command.summary) for command in commands]
    rows.append(("detoxrl --version", "Print the version"))
    table = "\n".join(f"  {usage:<29}{summary}" for usage, summary in rows)

    return f"""detoxrl {__version__}: make a text generator less toxic with RL, keep what it says, and prove both

{table}

RECIPE is a name from `detoxrl recipes`. RUN is a run folder, such as runs/quickstart.
`detoxrl COMMAND --help` lists the flags of a command, `detoxrl run RECIPE --help` also every setting.

Start here:
  detoxrl score "You are an idiot" "Thank you"
  detoxrl run quickstart
Your own data, model and reward:
  detoxrl run own --data.source my.jsonl --policy.base google/flan-t5-small --reward.function my.py:score
Several processes:
  torchrun --nproc-per-node 8 -m detoxrl run RECIPE    (or, on GPUs, accelerate launch --multi_gpu -m detoxrl ...)
Resume after an interruption:
  detoxrl run --resume --run-dir RUN

Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted (Ctrl-C), 143 terminated (SIGTERM).
"""


def command_help(command: Command, config: Config | None) -> str:
    """Return the help of a command, with every setting of `config` if it is given and the command takes settings."""
    help_flag = ("-h, --help", "Show this message.")
    if command.takes_settings:
        help_flag = ("-h, --help", "Show this message; after a recipe name, also every setting.")

    paragraphs = [f"Usage: {command.usage} [FLAGS]", f"{command.summary}."]
    if command.details:
        paragraphs.append(command.details)
    paragraphs.append("\n".join(["Flags:", *_rows([help_flag, *map(_help_row, command.options)])]))

    if command.takes_settings and config is not None:
        paragraphs.append(f"Settings of recipe {config.recipe}:")
        for title, options in _setting_options(config).items():
            paragraphs.append("\n".join([title, *_rows(map(_help_row, options))]))
    return "\n\n".join(paragraphs) + "\n"


def _parser(command: Command, options: Iterable[Option]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"detoxrl {command.name}",
        allow_abbrev=False,
        add_help=False,
        argument_default=argparse.SUPPRESS,
        exit_on_error=False,
    )
    parser.add_argument("-h", "--help", action="store_true")
    for name in command.positionals:
        parser.add_argument(name, nargs="?")
    for option in options:
        option.add_to(parser)
    return parser


def _split_at_dashes(words: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Return the words before the first `--` and those behind it, which are never flags."""
    if "--" not in words:
        return words, ()
    dashes = words.index("--")
    return words[:dashes], words[dashes + 1 :]


def _is_flag(word: str) -> bool:
    return word.startswith("-") and word != "-"


def _join_negative_values(words: Iterable[str], options: Iterable[Option]) -> list[str]:
    """Return the words with `--flag -1e-3` as `--flag=-1e-3`, because argparse would take the value for a flag."""
    switches = {option.flag for option in options if option.metavar is None}
    joined: list[str] = []
    for word in words:
        looks_negative = re.match(r"-(?!-|h$)", word)
        takes_value = joined and re.fullmatch(r"--[^=]+", joined[-1]) and joined[-1] not in switches
        if looks_negative and takes_value:
            joined[-1] = f"{joined[-1]}={word}"
        else:
            joined.append(word)
    return joined


def _refuse(word: str, command: Command, options: Iterable[Option]) -> None:
    """Raise InputError for a word that argparse could not place, with the flag that was meant or what there is."""
    remedy = "put its flag before it, or quote a value that contains spaces"
    require(_is_flag(word), "argument", word, "belongs to no flag", remedy)

    known = ["help"]
    for option in options:
        known.extend(flag.removeprefix("--") for flag in option.flags)
    flag = word.partition("=")[0]
    rule = f"is not known to `detoxrl {command.name}`"
    if command.repeated:
        remedy = f"put -- before a {command.repeated} that begins with a dash"
        raise InputError("flag", flag, rule, did_you_mean(flag, [f"--{name}" for name in known], remedy))
    raise InputError("flag", flag, rule, did_you_mean_setting(flag.lstrip("-"), known, prefix="--"))


def _setting_options(config: Config) -> dict[str, list[Option]]:
    """Return a flag for every setting of `config`, by the title of its section."""
    options = {"general: settings of the whole run": section_options(config, prefix="")}
    for field in fields(config):
        section = getattr(config, field.name)
        if is_dataclass(section):
            about = str(section.__doc__)
            title = f"{field.name}: {about[0].lower()}{about[1:].removesuffix('.')}"
            options[title] = section_options(section, prefix=f"{field.name}.")
    return options


def section_options(section: Any, prefix: str = "") -> list[Option]:
    """Return a flag for every setting of a section; its help is the field's docstring and its default."""
    section_type = type(section)
    assert is_pydantic_dataclass(section_type)
    types = get_type_hints(section_type)

    options = []
    for name, field in section_type.__pydantic_fields__.items():
        value = getattr(section, name)
        if name == "recipe" or is_dataclass(value):
            continue
        flag = f"--{prefix}{name}".replace("_", "-")
        is_switch = types[name] is bool
        options.append(
            Option(
                flag=flag,
                help=f"{field.description} (default: {_shown(value)})",
                metavar=_type_name(types[name]),
                nargs="*" if takes_list(types[name]) else None,
                off_flag=_off_flag(flag) if is_switch else None,
            )
        )
    return options


def _off_flag(flag: str) -> str:
    """Return the flag that turns a switch off: --sft.no-bf16 for --sft.bf16, --no-balance for --balance."""
    return flag.replace(".", ".no-") if "." in flag else flag.replace("--", "--no-", 1)


def _type_name(annotation: Any) -> str:
    """Return how help calls a value of this type."""
    if annotation in _TYPE_NAMES:
        return _TYPE_NAMES[annotation]
    members = get_args(annotation)
    if get_origin(annotation) is Literal:
        return "|".join(members)
    if get_origin(annotation) is tuple:
        return f"{_type_name(members[0])} ..."
    return "|".join(_type_name(member) for member in members)


def _shown(value: object) -> str:
    """Return how help shows a default: text without quotes, unless it holds spaces or line breaks."""
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, str) and value.split() != [value]:
        return repr(value)
    return str(value)


def _help_row(option: Option) -> tuple[str, str]:
    if option.off_flag or option.metavar is None:
        return ", ".join(option.flags), option.help
    return f"{option.flag} {option.metavar}", option.help


def _rows(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Return the lines of a table of flags and help texts, wrapped to the terminal."""
    width = min(shutil.get_terminal_size(fallback=(100, 24)).columns, 120)
    lines = []
    for flag, text in rows:
        left = f"  {flag}  "
        if len(left) > _HELP_COLUMN:
            lines.append(left.rstrip())
            left = ""
        first, *rest = textwrap.wrap(" ".join(text.split()), max(width - _HELP_COLUMN, 20), break_on_hyphens=False)
        lines.append(left.ljust(_HELP_COLUMN) + first)
        lines.extend(" " * _HELP_COLUMN + line for line in rest)
    return lines
