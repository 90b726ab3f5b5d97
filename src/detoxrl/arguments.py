"""What may be said behind `detoxrl`, and what does it mean?"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from detoxrl import __version__
from detoxrl.config.edit import closest_match, flatten, help_texts
from detoxrl.config.schema import Config
from detoxrl.errors import InputError, require

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
  detoxrl export RUN        a LoRA, or --merged a model, with its card for others; --push OWNER/NAME to the hub
  detoxrl doctor RECIPE     foretell memory and time, then try every part; write nothing
  detoxrl convert FROM TO   make safetensors of an old model or LoRA with a .bin
  detoxrl recipes           list the recipes
  detoxrl --version

RECIPE is a name from `detoxrl recipes`, or --from RUN/config.json; RUN is a run folder such as runs/quickstart.
Start with: detoxrl run quickstart
Own things: detoxrl run own --data.source my.jsonl --policy.base google/flan-t5-small --reward.function my.py:score
Several processes: torchrun --nproc-per-node 8 -m detoxrl run RECIPE, or accelerate launch -m detoxrl ...
Watch a run: --track tensorboard, trackio or wandb behind run, sweep, train, evaluate RUN; else none is contacted.
`detoxrl COMMAND --help` lists its options, `detoxrl run RECIPE --help` every setting with its default as well.
Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted (Ctrl-C), 143 terminated (SIGTERM); --resume goes on."""
WORDS = {
    "run": "RECIPE", "sweep": "RECIPE", "prepare": "RECIPE", "sft": "RUN", "train": "RUN", "evaluate": "RUN-OR-RECIPE",
    "report": "RUN", "export": "RUN", "doctor": "RECIPE", "convert": "FROM TO",
}  # fmt: skip
Given = dict[str, Any]


def parser_of(command: str, config: Config | None) -> argparse.ArgumentParser:
    """Return what reads the words behind `command`, with a flag for every setting of `config`."""
    about = "\n".join(line for line in USAGE.splitlines() if line.startswith(f"  detoxrl {command} "))
    parser = argparse.ArgumentParser(
        prog=f"detoxrl {command}", usage=argparse.SUPPRESS, description=about, allow_abbrev=False, add_help=False,
        argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter, exit_on_error=False,
    )  # fmt: skip
    add = parser.add_argument
    for word in WORDS[command].split():
        add(word, nargs="?", help=argparse.SUPPRESS)
    add("-h", "--help", action="store_true", help="show this; behind a RECIPE with every setting")
    if "RECIPE" in WORDS[command]:
        add("--from", type=Path, metavar="FILE", help="begin with the settings in a run's config.json, not a recipe's")
        add("--run-dir", type=Path, metavar="DIR", help="run folder to make; default runs/RECIPE")
        add("--overwrite", action="store_true", help="replace an existing run folder")
    if command in ("run", "sweep"):
        add("--resume", action="store_true", help="go on with an existing one; with --run-dir no recipe is needed")
        text = "go on with other settings or another machine; the run then ends otherwise, and says so"
        add("--accept-changes", action="store_true", help=text)
    if command in ("run", "sweep", "train", "evaluate"):
        add("--track", metavar="NAME", help="show it in tensorboard, trackio or wandb; --resume keeps it, none ends it")
    if command == "sweep":
        add("--over", action="extend", nargs="+", metavar="FIELD=VALUES", help="what to try: rl.kl-coef=0.05,0.2")
        add("--seeds", action="extend", type=lambda text: text.split(","), help="what to repeat each with: 0,1,2")
    if command == "evaluate":
        for flag, text in (("--policy", "models or LoRAs beside the start"), ("--texts", "texts; the first is before")):
            add(flag, action="extend", nargs="+", metavar="[NAME=]PATH", help=text)
        add("--power", type=float, metavar="SHARE", help="say how many prompts would find such a drop: 0.2")
    if command == "export":
        add("--to", type=Path, metavar="DIR", help="folder to make; default RUN-export")
        add("--push", metavar="OWNER/NAME", help="upload it to the hub, by the token in HF_TOKEN or of `hf auth login`")
        add("--merged", action="store_true", help="a whole model where a LoRA would do")
        add("--private", action="store_true", help="let others not see what is pushed")
        add("--overwrite", action="store_true", help="replace an earlier export")
    if config and "RECIPE" in WORDS[command]:
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


def parse(command: str, words: Sequence[str]) -> tuple[Given, Given]:
    """Return the settings and the options that `words` give. Raises InputError for what is neither."""
    config, bound = Config(recipe="any"), list[str]()
    for word in words:  # argparse would take a value such as -1e-3 for a flag
        if re.match(r"-(?!-|h$)", word) and bound and re.fullmatch(r"--[^=]+", bound[-1]):
            word = f"{bound.pop()}={word}"
        bound.append(word)
    parser = parser_of(command, config)
    try:
        found, unread = parser.parse_known_args(bound)
    except argparse.ArgumentError as error:
        raise InputError(str(error.argument_name), "", error.message, f"see `{parser.prog} --help`") from None
    if unread:
        word, remedy = unread[0].partition("=")[0], "put a flag before it, or quote text with spaces"
        require(word.startswith("-"), "word", unread[0], "belongs to no flag", remedy)
        known = re.findall(r"--[\w.-]+", parser.format_help())
        remedy = closest_match(word, known, f"see `{parser.prog} --help`")
        raise InputError("flag", word, f"is not known to `{parser.prog}`", remedy)
    given = vars(found)
    return {name: given.pop(name) for name in flatten(asdict(config)) if name in given}, given
