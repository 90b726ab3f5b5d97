"""What does each command do?"""

import argparse
import errno
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from detoxrl import __version__
from detoxrl.config import Config
from detoxrl.errors import DetoxrlError, InputError, require
from detoxrl.recipes import recipe, recipe_names
from detoxrl.settings import changed, config_from_json, flatten, help_texts, nearest
from detoxrl.stopping import Terminated, go_on_with, stopping

USAGE = f"""detoxrl {__version__}: make a text generator less toxic with RL, keep what it says, and prove both

  detoxrl run RECIPE        the main job: prepare, sft, train, evaluate, report
  detoxrl sweep RECIPE      runs over values and seeds: --over rl.kl-coef=0.05,0.2 --over rl.lr=1e-4,3e-4 --seeds 0,1
  detoxrl prepare RECIPE    make a run folder: prompts and reward model
  detoxrl sft RUN           warm-start the policy; fine-tune the civil baseline
  detoxrl train RUN         PPO from the warm start against the reward
  detoxrl evaluate RUN      before and after on held-out prompts, by an independent judge, beside baselines
  detoxrl evaluate RUN --power 0.2            how many prompts would find a drop of 20 %
  detoxrl evaluate RECIPE --policy [NAME=]PATH ...    any models or LoRAs beside the recipe's start
  detoxrl evaluate --texts [NAME=]FILE [NAME=]FILE    texts written elsewhere, the first is before
  detoxrl report RUN        write report.html
  detoxrl doctor RECIPE     foretell memory and time, then try every part; write nothing
  detoxrl convert FROM TO   make safetensors of an old model or LoRA with a .bin
  detoxrl recipes           list the recipes
  detoxrl --version

RECIPE is a name from `detoxrl recipes`, or --from RUN/config.json; RUN is a run folder such as runs/quickstart.
Start with: detoxrl run quickstart
Own things: detoxrl run own --data.source my.jsonl --policy.base google/flan-t5-small --reward.function my.py:score
Watch a run: --track tensorboard, trackio or wandb behind run, sweep or train; else no tracker is imported or contacted.
`detoxrl COMMAND --help` lists its options, `detoxrl run RECIPE --help` every setting with its default as well.
Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted (Ctrl-C), 143 terminated (SIGTERM); --resume goes on."""
_WORDS = {
    "run": "RECIPE", "sweep": "RECIPE", "prepare": "RECIPE", "sft": "RUN", "train": "RUN", "evaluate": "RUN-OR-RECIPE",
    "report": "RUN", "doctor": "RECIPE", "convert": "FROM TO",
}  # fmt: skip
_DONE = {
    "prepare": "prepared {root}; next: detoxrl sft {root}",
    "sft": "warm start ready in {root}; next: detoxrl train {root}",
    "train": "trained policy in {root}/adapter; next: detoxrl evaluate {root}",
    "evaluate": "measured: {root}/eval.json; next: detoxrl report {root}",
}
Given = dict[str, Any]


def _parser(command: str, config: Config | None) -> argparse.ArgumentParser:
    """Return what reads the words behind `command`, with a flag for every setting of `config`."""
    about = "\n".join(line for line in USAGE.splitlines() if line.startswith(f"  detoxrl {command} "))
    parser = argparse.ArgumentParser(
        prog=f"detoxrl {command}", usage=argparse.SUPPRESS, description=about, allow_abbrev=False, add_help=False,
        argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter, exit_on_error=False,
    )  # fmt: skip
    add = parser.add_argument
    for word in _WORDS[command].split():
        add(word, nargs="?", help=argparse.SUPPRESS)
    add("-h", "--help", action="store_true", help="show this; behind a RECIPE with every setting")
    if "RECIPE" in _WORDS[command]:
        add("--from", type=Path, metavar="FILE", help="begin with the settings in a run's config.json, not a recipe's")
        add("--run-dir", type=Path, metavar="DIR", help="run folder to make; default runs/RECIPE")
        add("--overwrite", action="store_true", help="replace an existing run folder")
    if command in ("run", "sweep"):
        add("--resume", action="store_true", help="go on with an existing one; with --run-dir no recipe is needed")
        text = "go on with other settings or another machine; the run then ends otherwise, and says so"
        add("--accept-changes", action="store_true", help=text)
    if command in ("run", "sweep", "train"):
        add("--track", metavar="NAME", help="show it in tensorboard, trackio or wandb; --resume keeps it, none ends it")
    if command == "sweep":
        add("--over", action="extend", nargs="+", metavar="FIELD=VALUES", help="what to try: rl.kl-coef=0.05,0.2")
        add("--seeds", action="extend", type=lambda text: text.split(","), help="what to repeat each with: 0,1,2")
    if command == "evaluate":
        for flag, text in (("--policy", "models or LoRAs beside the start"), ("--texts", "texts; the first is before")):
            add(flag, action="extend", nargs="+", metavar="[NAME=]PATH", help=text)
        add("--power", type=float, metavar="SHARE", help="say how many prompts would find such a drop: 0.2")
    if config and "RECIPE" in _WORDS[command]:
        _add_settings(parser, config)
    return parser


def _add_settings(parser: argparse.ArgumentParser, config: Config) -> None:
    sections = {title: section for title, section in vars(config).items() if is_dataclass(section)}
    for title, section in {"settings": config, **sections}.items():
        group = parser.add_argument_group(title, section.__doc__)
        for field, (kind, text) in help_texts(section).items():
            value, name = getattr(section, field), field if section is config else f"{title}.{field}"
            flag, text = f"--{name.replace('_', '-')}", f"{text} ({kind}, default {value!r})".replace("%", "%%")
            if isinstance(value, bool):
                group.add_argument(flag, dest=name, nargs="?", const=True, metavar="VALUE", help=text)
                group.add_argument(flag.replace(".", ".no-"), dest=name, action="store_false")
            else:
                several = "*" if isinstance(value, tuple) else None
                group.add_argument(flag, dest=name, nargs=several, metavar="VALUE", help=text)


def _parse(command: str, words: Sequence[str]) -> tuple[Given, Given]:
    """Return the settings and the options that `words` give. Raises InputError for what is neither."""
    config, bound = Config(recipe="any"), list[str]()
    for word in words:  # argparse would take a value such as -1e-3 for a flag
        if re.match(r"-(?!-|h$)", word) and bound and re.fullmatch(r"--[^=]+", bound[-1]):
            word = f"{bound.pop()}={word}"
        bound.append(word)
    parser = _parser(command, config)
    try:
        found, unread = parser.parse_known_args(bound)
    except argparse.ArgumentError as error:
        raise InputError(str(error.argument_name), "", error.message, f"see `{parser.prog} --help`") from None
    if unread:
        word, remedy = unread[0].partition("=")[0], "put a flag before it, or quote text with spaces"
        require(word.startswith("-"), "word", unread[0], "belongs to no flag", remedy)
        known = re.findall(r"--[\w.-]+", parser.format_help())
        remedy = nearest(word, known, f"see `{parser.prog} --help`")
        raise InputError("flag", word, f"is not known to `{parser.prog}`", remedy)
    given = vars(found)
    return {name: given.pop(name) for name in flatten(asdict(config)) if name in given}, given


def _on_recipe(command: str, name: str, settings: Given, given: Given) -> None:
    """Make a run folder, or try what would be made, by a recipe and the flags that change it."""
    with _kept(given.get("run_dir", Path("runs", name))):
        config = changed(_defaults(command, name, given), settings)
    usual = {"sweep": "sweep", "evaluate": "texts" if "texts" in given else f"{config.recipe}-measured"}
    root = given.get("run_dir", Path("runs", usual.get(command, config.recipe)))
    how: Given = {flag: flag in given for flag in ("overwrite", "resume", "accept_changes")}
    how["track"] = given.get("track")
    fits = not (how["overwrite"] and how["resume"])
    require(fits, "--resume", True, "does not go with --overwrite", "choose one of them")
    fits, remedy = how["resume"] or not how["accept_changes"], "add --resume, or leave it out"
    require(fits, "--accept-changes", True, "goes with --resume alone", remedy)
    with _kept(root):
        from detoxrl import doctor, stages, sweep
        from detoxrl.report.table import print_result

        if command == "doctor":
            doctor.doctor(root, config)
        elif command == "prepare":
            stages.prepare(root, config, how["overwrite"])
            print(_DONE[command].format(root=root))
        elif command == "sweep":
            sweep.sweep(root, config, given.get("over", []), given.get("seeds", []), **how)
        else:
            if command == "run":
                stages.run(root, config, **how)
            else:
                policies, texts = _named("policy", given), _named("texts", given)
                stages.evaluate(root, config, policies=policies, texts=texts, overwrite=how["overwrite"])
            print_result(root)


def _named(flag: str, given: Given) -> dict[str, str]:
    """Return the paths that a flag gives by their names, which are the paths themselves where none was given."""
    words = given.get(flag, [])
    pairs = [(word, "", word) if Path(word).exists() else word.partition("=") for word in words]
    found = {name: path or name for name, _, path in pairs}
    require(len(found) == len(words), f"--{flag}", " ".join(words), "names one twice", "rename")
    return found


def _defaults(command: str, name: str, given: Given) -> Config:
    """Return the settings that flags change: a recipe's, those of --from, or those of the run to resume."""
    if "from" in given:
        source = given["from"]
        require(not name, "--from", str(source), "does not go with a recipe", "leave one of them out")
        path = source / "config.json" if source.is_dir() else source
        require(path.is_file(), "--from", str(source), "is no file", "give a run's config.json")
        return config_from_json(path)
    if not name and "texts" in given:
        return recipe("quickstart")  # for what it says of judges: no model of it is used
    if not name and "resume" in given:
        require("run_dir" in given, "--run-dir", "", "is missing", "say `detoxrl run --resume --run-dir DIR`")
        from detoxrl.tracking import RunFolder

        base = given["run_dir"] / "base.json"
        swept = command == "sweep" and base.is_file()
        return config_from_json(base) if swept else RunFolder.open(given["run_dir"])[1]
    require(name != "", "recipe", name, "is missing", f"say `detoxrl {command} RECIPE`; see `detoxrl recipes`")
    return recipe(name)


def _on_run(command: str, name: str, settings: Given, given: Given) -> None:
    """Do a stage of a run again, or measure the run otherwise than before."""
    require(name != "", "run folder", name, "is missing", f"say `detoxrl {command} runs/NAME`")
    root, remedy, track = Path(name), "use --policy, --power or settings", given.pop("track", None)
    require(given.keys() <= {"power", "policy"}, "flags", " ".join(given), "do not go with a run that is there", remedy)
    with _kept(root):
        from detoxrl import measuring, stages
        from detoxrl.report.table import print_result
        from detoxrl.tracking import RunFolder

        if "power" in given:
            print(measuring.needed_prompts(root, given["power"]))
            return
        if settings:
            stages.run(root, changed(RunFolder.open(root)[1], settings), resume=True, track=track)
        if "policy" in given:
            stages.evaluate(root, policies=_named("policy", given))
        if not settings and not given:
            stages.again(root, command, track=track)
        if command == "report" or settings or given:
            print_result(root)
        else:
            print(_DONE[command].format(root=root))


@contextmanager
def _kept(root: Path) -> Iterator[None]:
    """Say what is kept and how to go on when a run is stopped or the disk is full."""
    try:
        with stopping():
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
    command = "sweep" if (root / "sweep.json").is_file() else "run"
    if command == "run" and not (root / "config.json").is_file():
        return "nothing was written"
    kept = ", ".join(sorted(path.name for path in root.iterdir() if not path.name.startswith(".")))
    return f"{root} keeps {kept}; {go_on_with(root, command)}"


def _dispatch(words: Sequence[str]) -> None:
    command = words[0] if words else "help"
    if command in ("-h", "--help", "help"):
        print(USAGE)
    elif command == "--version":
        print(__version__)
    elif command == "recipes":
        for name, purpose in recipe_names().items():
            print(f"{name:<21} {purpose}")
    else:
        remedy = nearest(command, [*_WORDS, "recipes", "help"], "see `detoxrl --help`")
        require(command in _WORDS, "command", command, "is not a command", remedy)
        _obey(command, *_parse(command, words[1:]))


def _obey(command: str, settings: Given, given: Given) -> None:
    name = given.pop(_WORDS[command].split()[0], "")
    subjects = given.keys() & {"policy", "texts"} and not (name and Path(name, "config.json").is_file())
    if "help" in given:
        print(_parser(command, recipe(name) if name in recipe_names() else None).format_help(), end="")
    elif command == "convert":
        require("TO" in given, "words", name, "must be two", "say `detoxrl convert FROM TO`, two folders")
        from detoxrl.convert import convert

        print(f"{given['TO']}: {convert(name, Path(given['TO']))}; next: name that folder where you named {name}")
    elif _WORDS[command] == "RECIPE" or subjects:
        require("power" not in given, "--power", given.get("power"), "does not go with evaluate RECIPE", "name a run")
        _on_recipe(command, name, settings, given)
    else:
        _on_run(command, name, settings, given)


def main(words: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 done, 1 failed, 2 bad input, 130 and 143 stopped. Bugs keep their traceback."""
    try:
        with stopping():
            _dispatch(sys.argv[1:] if words is None else words)
    except DetoxrlError as error:
        code = 2 if isinstance(error, InputError) else 1
        sys.exit(_complain("; ".join([str(error), *getattr(error, "__notes__", [])]), code))
    except KeyboardInterrupt as stop:
        what, code = ("terminated", 143) if isinstance(stop, Terminated) else ("interrupted", 130)
        sys.exit(_complain("; ".join([what, *getattr(stop, "__notes__", ["nothing was begun"])]), code))
    except BrokenPipeError:  # whoever read our output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _complain(message: str, code: int) -> int:
    print(f"detoxrl: {message}", file=sys.stderr)
    return code
