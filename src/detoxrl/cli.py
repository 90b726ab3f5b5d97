"""What does each command do?"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import tyro
from safetensors import SafetensorError

from detoxrl import __version__
from detoxrl.config import Config
from detoxrl.errors import DetoxrlError, InputError, require
from detoxrl.recipes import recipe, recipe_names
from detoxrl.settings import changed, config_from_json, flatten, nearest
from detoxrl.stopping import Terminated, go_on_with, stopping_at_once

COMMANDS = ("run", "prepare", "sft", "train", "evaluate", "report", "doctor", "convert", "recipes", "help")
_OPTIONS = """
RECIPE is a name from `detoxrl recipes`, or --from RUN/config.json; RUN is a run folder such as runs/quickstart.
  --run-dir DIR   run folder to make; default runs/RECIPE
  --overwrite     replace an existing run folder
  --resume        go on with an existing one; with --run-dir alone no recipe is needed
  --accept-changes  go on with other settings or another machine; the run then ends otherwise, and says so
"""
USAGE = f"""detoxrl {__version__}: make a text generator less toxic with RL, keep what it says, and prove both

  detoxrl run RECIPE        the main job: prepare, sft, train, evaluate, report
  detoxrl prepare RECIPE    make a run folder: prompts and reward model
  detoxrl sft RUN           warm-start the policy; fine-tune the civil baseline
  detoxrl train RUN         PPO from the warm start against the reward
  detoxrl evaluate RUN      before and after on held-out prompts, by an independent judge
  detoxrl report RUN        write report.html
  detoxrl doctor RECIPE     foretell memory and time, then try every part; write nothing
  detoxrl convert FROM TO   make safetensors of an old model or LoRA with a .bin
  detoxrl recipes           list the recipes
  detoxrl --version
{_OPTIONS}
Start with: detoxrl run quickstart
Own things: detoxrl run own --data.source my.jsonl --policy.base google/flan-t5-small --reward.function my.py:score
`detoxrl run RECIPE --help` lists every setting with its default.
Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted (Ctrl-C), 143 terminated (SIGTERM); --resume goes on."""
_DONE = {
    "sft": "warm start ready in {root}; next: detoxrl train {root}",
    "train": "trained policy in {root}/adapter; next: detoxrl evaluate {root}",
    "evaluate": "measured: {root}/eval.json; next: detoxrl report {root}",
}
_VALUES = {"overwrite": 0, "resume": 0, "accept_changes": 0, "run_dir": 1, "from": 1}  # that options take


def _parse(words: Sequence[str], config: Config | None) -> tuple[dict[str, object], dict[str, str]]:
    """Return settings and options that the flags among `words` give. Raises InputError for an unknown flag.

    Without a config only options are known.
    """
    defaults = flatten(asdict(config)) if config else {}
    settings: dict[str, object] = {}
    options: dict[str, str] = {}
    for flag, values in _flags(words):
        name = flag.replace("-", "_")
        off = ".".join(part.removeprefix("no_") for part in name.split("."))
        if name in _VALUES:
            options[name] = _count(flag, values, _VALUES[name])
        elif name != off and isinstance(defaults.get(off), bool):
            _count(flag, values, 0)
            settings[off] = False
        elif isinstance(defaults.get(name), tuple):
            settings[name] = values
        elif name in defaults and name != "recipe":
            switched_on = isinstance(defaults[name], bool) and not values
            settings[name] = switched_on or _count(flag, values, 1)
        elif config:
            known = [f"--{known.replace('_', '-')}" for known in (*defaults, *_VALUES)]
            remedy = nearest(f"--{flag}", known, f"see `detoxrl run {config.recipe} --help`")
            raise InputError("flag", f"--{flag}", "is not known", remedy)
    return settings, options


def _flags(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    flag, values = "", list[str]()
    for word in [*words, "--"]:
        if not word.startswith("--"):
            require(flag != "", "word", word, "belongs to no flag", "put a flag before it, or quote text with spaces")
            values.append(word)
            continue
        if flag:
            yield flag, values
        flag, equals, value = word[2:].partition("=")
        values = [value] if equals else []


def _count(flag: str, values: list[str], count: int) -> str:
    remedy = f"write --{flag}=VALUE" if count else f"write --{flag} alone"
    require(len(values) == count, f"--{flag}", " ".join(values), f"takes {count or 'no'} value", remedy)
    return values[0] if values else ""


def _recipe_command(command: str, words: Sequence[str]) -> None:
    name, rest = (words[0], words[1:]) if words and not words[0].startswith("-") else ("", words)
    if "--help" in rest or "-h" in words:
        if name:
            about = f"Every setting of the recipe can be changed by a flag.\n{_OPTIONS}"
            tyro.cli(Config, prog=f"detoxrl {command} {name}", description=about, args=["--help"], default=recipe(name))
        print(USAGE)
        return
    _, options = _parse(rest, None)
    with _kept(Path(options.get("run_dir", f"runs/{name}"))):
        defaults = _defaults(command, name, options)
        settings, _ = _parse(rest, defaults)
        config = changed(defaults, settings)
    root = Path(options.get("run_dir", f"runs/{config.recipe}"))
    overwrite, resume, accept = (name in options for name in ("overwrite", "resume", "accept_changes"))
    require(not (overwrite and resume), "--resume", True, "does not go with --overwrite", "choose one of them")
    require(not resume or command == "run", "--resume", True, "goes on with a whole run", "say `detoxrl run`")
    require(resume or not accept, "--accept-changes", True, "goes with --resume alone", "add --resume, or leave it out")
    with _kept(root):
        if command == "doctor":
            from detoxrl.doctor import doctor

            doctor(root, config)
            return
        from detoxrl import stages
        from detoxrl.report.table import print_result

        if command == "prepare":
            stages.prepare(root, config, overwrite)
            print(f"prepared {root}; next: detoxrl sft {root}")
            return
        stages.run(root, config, overwrite=overwrite, resume=resume, accept_changes=accept)
        print_result(root)


def _defaults(command: str, name: str, options: dict[str, str]) -> Config:
    """Return the settings that flags change: a recipe's, those of --from, or those of the run to resume."""
    source = options.get("from")
    if not name and not source and "resume" in options:
        require("run_dir" in options, "--run-dir", "", "is missing", "say `detoxrl run --resume --run-dir DIR`")
        from detoxrl.tracking import RunFolder

        return RunFolder.open(Path(options["run_dir"]))[1]
    require(not (name and source), "--from", source, "does not go with a recipe", "leave one of them out")
    if source:
        path = Path(source, "config.json") if Path(source).is_dir() else Path(source)
        require(path.is_file(), "--from", source, "is no file", "give a run's config.json")
        return config_from_json(path)
    remedy = f"say `detoxrl {command} RECIPE`; see `detoxrl recipes`"
    require(name != "", "recipe", name, "is missing", remedy)
    return recipe(name)


def _stage_command(command: str, words: Sequence[str]) -> None:
    if len(words) != 1 or words[0].startswith("-"):
        raise InputError("run folder", " ".join(words), "must be one folder", f"say `detoxrl {command} runs/NAME`")
    root = Path(words[0])
    with _kept(root):
        from detoxrl import stages
        from detoxrl.report.table import print_result

        stages.again(root, command)
        if command == "report":
            print_result(root)
        else:
            print(_DONE[command].format(root=root))


def _convert(words: Sequence[str]) -> None:
    require(len(words) == 2, "words", " ".join(words), "must be two", "say `detoxrl convert FROM TO`, two folders")
    from detoxrl.convert import convert

    done = convert(words[0], Path(words[1]))
    print(f"{words[1]}: {done}; next: name that folder where you named {words[0]}")


@contextmanager
def _kept(root: Path) -> Iterator[None]:
    """Say what is kept and how to go on when a run is stopped or the disk is full."""
    try:
        with stopping_at_once():
            yield
    except KeyboardInterrupt as stop:
        stop.add_note(_how_to_go_on(root))
        raise
    except (OSError, SafetensorError) as error:
        # safetensors wraps the system's error in one of its own.
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error):
            sys.exit(_complain(f"the disk is full; {_how_to_go_on(root)}", 1))
        raise


def _how_to_go_on(root: Path) -> str:
    if not (root / "config.json").is_file():
        return "nothing was written"
    kept = ", ".join(sorted(path.name for path in root.iterdir() if not path.name.startswith(".")))
    return f"{root} keeps {kept}; {go_on_with(root)}"


def _dispatch(words: Sequence[str]) -> None:
    command = words[0] if words else "--help"
    if command in ("-h", "--help", "help"):
        print(USAGE)
    elif command == "--version":
        print(__version__)
    elif command == "recipes":
        for name, purpose in recipe_names().items():
            print(f"{name:<21} {purpose}")
    elif command == "convert":
        _convert(words[1:])
    elif command in ("run", "prepare", "doctor"):
        _recipe_command(command, words[1:])
    elif command in ("sft", "train", "evaluate", "report"):
        _stage_command(command, words[1:])
    else:
        raise InputError("command", command, "is not a command", nearest(command, COMMANDS, "see `detoxrl --help`"))


def main(words: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 done, 1 failed, 2 bad input, 130 and 143 stopped. Bugs keep their traceback."""
    try:
        with stopping_at_once():
            _dispatch(sys.argv[1:] if words is None else words)
    except InputError as error:
        sys.exit(_complain("; ".join([str(error), *getattr(error, "__notes__", [])]), 2))
    except DetoxrlError as error:
        sys.exit(_complain(str(error), 1))
    except KeyboardInterrupt as stop:
        what, code = ("terminated", 143) if isinstance(stop, Terminated) else ("interrupted", 130)
        sys.exit(_complain("; ".join([what, *getattr(stop, "__notes__", ["nothing was begun"])]), code))
    except BrokenPipeError:  # whoever read our output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _complain(message: str, code: int) -> int:
    print(f"detoxrl: {message}", file=sys.stderr)
    return code
