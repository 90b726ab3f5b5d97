"""Which commands are there, and what does each of them call?

A command is a row of `COMMANDS` and a function. The function imports what it needs when it is called, because torch and
transformers take seconds to import and help must not wait for them.
"""

import errno
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors import SafetensorError

from detoxrl import __version__
from detoxrl.arguments import Command, Option, Request, command_help, overview, parse, section_options
from detoxrl.commands.export_check import default_target, require_measured, require_writable
from detoxrl.commands.fit_check import how_to_resume, planned_fit, resumed_fit
from detoxrl.commands.preflight import (
    check_stage,
    check_subjects,
    checked_config,
    checked_run,
    checked_subjects,
    convertible_folder,
    convertible_gguf,
    is_gguf,
)
from detoxrl.commands.sweep_plan import SweepPlan, planned_sweep
from detoxrl.commands.tracker_state import resolve_tracker
from detoxrl.config.edit import config_from_json, fit_config, with_settings, without_stale_targets
from detoxrl.config.fit import FitConfig
from detoxrl.config.names import did_you_mean
from detoxrl.config.recipes import recipe, recipe_names
from detoxrl.config.schema import Config
from detoxrl.errors import DetoxrlError, InputError, ProcessError, require
from detoxrl.evaluation.subjects import Subjects, subjects_of
from detoxrl.report.fit_words import ending as fit_ending
from detoxrl.runtime.console import status
from detoxrl.runtime.run_folder import IfExists, RunFolder
from detoxrl.runtime.signals import Terminated, resume_hint, stop_signals

# Commands that take texts


def _score(request: Request) -> None:
    options = request.options

    with _explained_stop(None):
        from detoxrl.commands import score

        judges = score.named_judges(options.get("judge", []))
        texts = score.given_texts(request.positionals, options.get("file"), options.get("column"))
        score.score(texts, judges, jsonl="jsonl" in options, show="show" in options)


def _fit(request: Request) -> None:
    options = {**request.options, **request.settings}  # Some settings have the name of one of a run, such as seed.
    out = options.pop("out", None)
    require(out is not None, "--out", "", "is missing", "name the folder to create")
    assert out is not None
    resume = options.pop("resume", False)
    overwrite = options.pop("overwrite", False)
    source = request.target

    with _explained_stop(out, how_to_resume):
        if resume:
            given = [*([source] if source else []), *options, *(["overwrite"] if overwrite else [])]
            require(not given, "--resume", True, "keeps the settings of the stopped fit", "give --out alone")
            plan = resumed_fit(out)
        else:
            remedy = "run `detoxrl fit SOURCE --out FOLDER`, with the source before flags of several values"
            require(source != "", "SOURCE", "", "is missing", remedy)
            plan = planned_fit(fit_config({"source": source, **options}), out, overwrite)

        with status("loading torch and transformers"):
            from detoxrl.commands.fit import run_fit
        result = run_fit(plan)

    print("\n".join(fit_ending(out, result)))


# Commands that take a recipe


def _run(request: Request) -> None:
    config = _config(request)
    root = _root(request, config.recipe)
    if_exists = existing_run_policy(request.options)
    track = request.options.get("track")

    with _explained_stop(root):
        resolve_tracker(track, root if if_exists.startswith("resume") else None)
        config = checked_run(root, config, if_exists)

        stages = _imported_stages()
        from detoxrl.report.terminal import print_result

        stages.run(root, config, if_exists=if_exists, track=track)
        print_result(root)


def _sweep(request: Request) -> None:
    config = _config(request)
    root = _root(request, "sweep")
    if_exists = existing_run_policy(request.options)
    options = request.options
    plan = SweepPlan(over=options.get("over", []), seeds=options.get("seeds", []), track=options.get("track"))

    with _explained_stop(root):
        plan, _ = planned_sweep(root, config, plan, if_exists)

        from detoxrl.commands import sweep

        sweep.sweep(root, config, plan, if_exists)


def _prepare(request: Request) -> None:
    config = _config(request)
    root = _root(request, config.recipe)
    if_exists = existing_run_policy(request.options)

    with _explained_stop(root):
        config = checked_run(root, config, if_exists)

        stages = _imported_stages()

        stages.prepare(root, config, if_exists)
        _print_next(request, root)


def _doctor(request: Request) -> None:
    config = _config(request)
    root = _root(request, config.recipe)

    with _explained_stop(root):
        config = checked_config(config)

        from detoxrl.commands import doctor

        doctor.doctor(root, config)


def _recipes(request: Request) -> None:
    for name, purpose in recipe_names().items():
        print(f"{name:<22} {purpose}")


# Commands that take a run folder


def _rerun_stage(request: Request) -> None:
    """Run one stage of an existing run again: sft, train or report."""
    root = _existing_root(request)
    stage = request.command.name

    with _explained_stop(root):
        check_stage(*RunFolder.open(root), stage)

        stages = _imported_stages()
        from detoxrl.report.terminal import print_result

        stages.rerun_stage(root, stage, track=request.options.get("track"))
        if stage == "report":
            print_result(root)
        else:
            _print_next(request, root)


def _evaluate(request: Request) -> None:
    """Measure an existing run, or policies or texts in a folder of their own."""
    names_subjects = "policy" in request.options or "texts" in request.options
    is_run = request.target != "" and Path(request.target, "config.json").is_file()

    if names_subjects and not is_run:
        _evaluate_subjects(request)
    else:
        _evaluate_run(request)


def _evaluate_subjects(request: Request) -> None:
    options = request.options
    power = options.get("power")
    track = options.get("track")
    require(power is None, "--power", power, "cannot be combined with a recipe or --texts", "name a run instead")
    require(track is None, "--track", track, "cannot be combined with a recipe or --texts", "leave it out")

    config = _config(request)
    root = _root(request, "texts" if "texts" in options else f"{config.recipe}-measured")
    policies = _named_paths("policy", options)
    texts = _named_paths("texts", options)

    with _explained_stop(root):
        RunFolder.require_usable(root, "overwrite" in options)
        checked_subjects(subjects_of(policies, texts, config), config)

        stages = _imported_stages()
        from detoxrl.report.terminal import print_result

        stages.evaluate(root, config, policies=policies, texts=texts, overwrite="overwrite" in options)
        print_result(root)


def _evaluate_run(request: Request) -> None:
    root = _existing_root(request)
    options = dict(request.options)
    track = options.pop("track", None)

    for name in options.keys() - {"power", "policy"}:
        flag = f"--{name.replace('_', '-')}"
        raise InputError("flag", flag, "cannot be used with an existing run", "use --policy, --power or settings")
    require(track is None or not options, "--track", track, "cannot be combined with --power or --policy", "choose one")

    policies = _named_paths("policy", options)
    _, config = RunFolder.open(root)

    with _explained_stop(root):
        check_subjects(Subjects(policies=policies))
        if request.settings:
            config = checked_run(root, with_settings(config, request.settings), "resume")
        elif "power" not in options:
            check_stage(*RunFolder.open(root), "evaluate")

        stages = _imported_stages()
        from detoxrl.commands import measure as measuring
        from detoxrl.report.terminal import print_result

        if "power" in options:
            print(measuring.needed_prompts(root, options["power"]))
            return

        if request.settings:
            stages.run(root, config, if_exists="resume", track=track)
        if policies:
            stages.evaluate(root, policies=policies)

        if request.settings or options:
            print_result(root)
        else:
            stages.rerun_stage(root, "evaluate", track=track)
            _print_next(request, root)


def _export(request: Request) -> None:
    root = _existing_root(request)
    options = request.options

    with _explained_stop(None):
        folder, _ = RunFolder.open(root)
        require_writable(options.get("to", default_target(root)), "overwrite" in options)
        require_measured(folder)

        from detoxrl.commands.export import export

        made = export(
            root,
            to=options.get("to"),
            push=options.get("push"),
            merged="merged" in options,
            private="private" in options,
            overwrite="overwrite" in options,
        )

    print(f"{made.what}: {made.folder}")
    card = made.folder / "README.md"
    if made.address:
        print(f"next: read {card}; look at {made.address}")
    else:
        print(f"next: read {card}, then share it: --overwrite --push OWNER/NAME")


def _convert(request: Request) -> None:
    complete = len(request.positionals) == 2
    require(complete, "TO", "", "is missing", "run `detoxrl convert FROM TO` with a model and a new folder")
    source, target = request.positionals
    if is_gguf(source):
        _convert_gguf(source, Path(target))
        return

    convertible_folder(source, Path(target))

    from detoxrl.commands.convert import convert

    print(f"{target}: {convert(source, Path(target))}; next: use {target} in place of {source}")


def _convert_gguf(source: str, target: Path) -> None:
    with _explained_stop(None):
        convertible_gguf(source, target)

        with status("loading torch and transformers"):
            from detoxrl.commands.convert_gguf import convert_gguf

        made = convert_gguf(source, target)

    print(f"{target}: {made}")
    print(f"next: detoxrl run own --policy.base {target} --data.source my.jsonl")


# What the commands share


def _imported_stages() -> ModuleType:
    """Return the module of the stages, and show meanwhile what takes the first seconds."""
    with status("loading torch and transformers"):
        from detoxrl.commands import run as stages
    return stages


def existing_run_policy(options: Mapping[str, Any]) -> IfExists:
    """Return what to do if the run folder exists. Raises InputError for flags that contradict each other."""
    overwrite = "overwrite" in options
    resume = "resume" in options
    accept_changes = "accept_changes" in options
    require(not (overwrite and resume), "--resume", True, "cannot be combined with --overwrite", "choose one of them")
    require(resume or not accept_changes, "--accept-changes", True, "requires --resume", "add --resume or leave it out")

    if overwrite:
        return "overwrite"
    if accept_changes:
        return "resume with changes"
    return "resume" if resume else "error"


def _config(request: Request) -> Config:
    """Return the config that the command line describes: where its settings start from, changed by its flags."""
    likely_root = _root(request, request.target)
    with _explained_stop(likely_root):
        return with_settings(_initial_config(request), without_stale_targets(request.settings))


def _initial_config(request: Request) -> Config:
    """Return the config that flags change: that of --from, of the run to resume, or of a recipe."""
    options = request.options
    name = request.target

    if "from" in options:
        source = options["from"]
        require(name == "", "--from", str(source), "cannot be combined with a recipe", "leave one of them out")
        path = source / "config.json" if source.is_dir() else source
        require(path.is_file(), "--from", str(source), "is not a file", "give a run's config.json")
        return config_from_json(path)

    if name == "" and "texts" in options:
        return recipe("quickstart")  # for its judges; no model of it is used

    if name == "" and "resume" in options:
        command = f"detoxrl {request.command.name} --resume --run-dir DIR"
        require("run_dir" in options, "--run-dir", "", "is missing", f"run `{command}`")
        return _config_to_resume(request)

    remedy = f"run `{request.command.usage}` with a name from `detoxrl recipes`"
    require(name != "", "recipe", name, "is missing", remedy)
    return recipe(name)


def _config_to_resume(request: Request) -> Config:
    root = request.options["run_dir"]
    base = root / "base.json"  # what the runs of a sweep have in common
    if request.command.name == "sweep" and base.is_file():
        return config_from_json(base)
    return RunFolder.open(root)[1]


def _root(request: Request, default_name: str) -> Path:
    """Return the folder that the command creates."""
    root: Path = request.options.get("run_dir", Path("runs", default_name))
    return root


def _existing_root(request: Request) -> Path:
    """Return the run folder that the command is given."""
    remedy = f"run `detoxrl {request.command.name} runs/NAME`"
    require(request.target != "", "run folder", "", "is missing", remedy)
    return Path(request.target)


def _named_paths(option: str, options: Mapping[str, Any]) -> dict[str, str]:
    """Return, by name, the paths given as [NAME=]PATH. A path without a name is its own name."""
    words = options.get(option, [])
    paths: dict[str, str] = {}
    for word in words:
        if Path(word).exists():  # a path may contain =
            name, path = word, word
        else:
            name, _, path = word.partition("=")
        require(name not in paths, f"--{option}", word, f"repeats the name {name}", "give each path its own name")
        paths[name] = path or name
    return paths


_NEXT = {
    "prepare": "prepared {root}; next: detoxrl sft {root}",
    "sft": "warm start is ready in {root}; next: detoxrl train {root}",
    "train": "trained policy is in {root}/adapter; next: detoxrl evaluate {root}",
    "evaluate": "results are in {root}/eval.json; next: detoxrl report {root}",
}


def _print_next(request: Request, root: Path) -> None:
    print(_NEXT[request.command.name].format(root=root))


@contextmanager
def _explained_stop(root: Path | None, explain: Callable[[Path], str] | None = None) -> Iterator[None]:
    """If the command is interrupted or the disk is full, say what was saved in `root` and how to resume.

    `explain` says it for what is no run folder.
    """

    def what_remains() -> str:
        return explain(root) if explain and root else _how_to_resume(root)

    try:
        with stop_signals():
            yield
    except (KeyboardInterrupt, ProcessError) as stop:
        if not getattr(stop, "__notes__", []):
            stop.add_note(what_remains())
        raise
    except (OSError, SafetensorError) as error:
        if _is_disk_full(error):
            sys.exit(_complain(f"the disk is full; {what_remains()}", 1))
        raise


def _is_disk_full(error: OSError | SafetensorError) -> bool:
    # safetensors wraps the system's error in one of its own, with the number in its text.
    number = error.errno if isinstance(error, OSError) else None
    return number in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)


def _how_to_resume(root: Path | None) -> str:
    """Return what an interrupted command left in `root`, and the command that resumes it."""
    if root is None:
        return "nothing unfinished was left behind"

    command = "sweep" if (root / "sweep.json").is_file() else "run"
    if command == "run" and not (root / "config.json").is_file():
        return "nothing was written"

    saved = sorted(path.name for path in root.iterdir() if not path.name.startswith("."))
    return f"{root} keeps {', '.join(saved)}; {resume_hint(root, command)}"


# The table of commands

_NEW_RUN = (
    Option("--from", "Start from the settings in a run's config.json instead of a recipe.", metavar="FILE", parse=Path),
    Option("--run-dir", "Run folder to create. Default: runs/ and the name of the recipe.", metavar="DIR", parse=Path),
    Option("--overwrite", "Replace an existing run folder."),
)
_RESUME = (
    Option("--resume", "Resume an existing run folder. With --run-dir, the recipe may be left out."),
    Option(
        "--accept-changes",
        "Resume with other settings or on another machine. Results will differ from an uninterrupted run; "
        "the report records it.",
    ),
)
_TRACK = Option(
    "--track",
    "Send metrics to tensorboard, trackio or wandb. A resumed run keeps its tracker; `none` ends tracking. "
    "Default: no tracker.",
    metavar="NAME",
)
_SWEEP = (
    Option(
        "--over",
        "Values to try of one setting, such as rl.kl-coef=0.05,0.2; give several to combine settings.",
        metavar="FIELD=VALUES",
        nargs="+",
        action="extend",
    ),
    Option(
        "--seeds",
        "Seeds with which each combination is repeated, such as 0,1,2.",
        metavar="SEEDS",
        action="extend",
        parse=lambda text: text.split(","),
    ),
)
_EVALUATE = (
    Option(
        "--policy",
        "Models or LoRA adapters to measure beside the initial policy.",
        metavar="[NAME=]PATH ...",
        nargs="+",
        action="extend",
    ),
    Option(
        "--texts",
        "Files of responses to measure. The first is before, the second after; a single one is compared with the "
        "references.",
        metavar="[NAME=]FILE ...",
        nargs="+",
        action="extend",
    ),
    Option(
        "--power",
        "Print how many prompts are needed to detect a relative drop of this size, such as 0.2. Measures nothing.",
        metavar="SHARE",
        parse=float,
    ),
)
_EVALUATE_DETAILS = """\
  detoxrl evaluate RUN                               a run, by an independent judge and beside baselines
  detoxrl evaluate RUN --power 0.2                   number of prompts that detects a drop of 20 %
  detoxrl evaluate RECIPE --policy [NAME=]PATH ...   any models or LoRA adapters beside the recipe's initial policy
  detoxrl evaluate --texts [NAME=]FILE ...           responses that were written elsewhere"""
_EXPORT = (
    Option("--to", "Folder to create. Default: RUN-export.", metavar="DIR", parse=Path),
    Option(
        "--push",
        "Upload the export to the Hugging Face hub, with the token in HF_TOKEN or of `hf auth login`.",
        metavar="OWNER/NAME",
    ),
    Option("--merged", "Write a whole model with the adapter merged into the base, even if an adapter would do."),
    Option("--private", "Make the pushed repository private."),
    Option("--overwrite", "Replace an earlier export."),
)

_SCORE = (
    Option(
        "--file",
        "Read texts from a file instead: one per line, or those of a column of a .csv, .json, .jsonl, .jsonl.gz or "
        ".parquet file. `-` is stdin, one text per line; without TEXT and --file, what is piped in is read.",
        metavar="FILE",
    ),
    Option("--column", "Column of the texts in a file with columns. Default: text.", metavar="NAME"),
    Option(
        "--judge",
        "Judges to ask: perspective-minilm, a classifier fitted to the scores of Perspective; one of its other scores, "
        "perspective-minilm=insult, or perspective-minilm=all; alt-profanity-check, a linear model of words; embedded, "
        "the small reward model of the quickstart, which knows little more than its generated quarrels; or "
        "SOURCE=LABEL, the folder or hub id of a classifier and its toxic label. Give several, or repeat the flag. "
        "Default: perspective-minilm beside alt-profanity-check where 'detoxrl[judge]' is installed, else "
        "alt-profanity-check (English only, both).",
        metavar="NAME ...",
        nargs="+",
        action="extend",
    ),
    Option("--jsonl", "Print a JSON object per text, and nothing else, to stdout."),
    Option("--show", "Do not mask toxic words."),
)
_FIT = (
    Option("--out", "Folder to create.", metavar="FOLDER", parse=Path),
    Option("--overwrite", "Replace an earlier fit in this folder."),
    Option("--resume", "Continue the fit of --out that was stopped; give no other flag."),
    *(option for option in section_options(FitConfig(source="any")) if option.flag != "--source"),
)
_FIT_DETAILS = """\
  detoxrl fit comments.csv --out judge --label-columns toxic
  detoxrl fit comments.csv --out judge --labels nothate hate          classes by name, or by number from 0 on
  detoxrl fit thumbs.jsonl --out liked --text-column reply --label-columns thumb
  detoxrl fit pairs.jsonl --out scorer --chosen-column civil --rejected-column toxic
  detoxrl fit allenai/real-toxicity-prompts --out perspective --lora-rank 16
      --text-column prompt.text continuation.text --label-columns toxicity insult threat
  detoxrl fit --resume --out judge                                    after Ctrl-C, or a kill

SOURCE is a file (.csv, .json, .jsonl, .jsonl.gz, .parquet), a folder of them,
or a hub id. Its splits train, validation and test are used if it has them.

FOLDER becomes an ordinary transformers classifier, or a LoRA adapter, with a
model card. `reward.classifier`, judges and `detoxrl score --judge FOLDER=LABEL`
take it. fit.json holds the results on held-out texts.

Held-out texts that are near-duplicates of training texts are removed and
counted, and so are rows without a text or a label."""
_CONVERT_DETAILS = """\
  detoxrl convert FILE.gguf FOLDER   a GGUF model in full precision, with its tokenizer (needs 'detoxrl[gguf]')
  detoxrl convert OLD FOLDER         a folder or hub id with .bin weights; no code that a pickle may hold is run"""
_SCORE_DETAILS = """\
  detoxrl score "You are an idiot" "Thank you"
  detoxrl score --file comments.txt                  one text per line
  detoxrl score --file comments.csv --column body --jsonl > scores.jsonl
  detoxrl score "Thanks" --judge alt-profanity-check unitary/toxic-bert=toxic
  detoxrl score "Thanks" --judge perspective-minilm=all --jsonl      eight scores, in one pass
  tail -n 100 chat.log | detoxrl score
  detoxrl score -- "-1 for this"                     a text that begins with a dash

Each judge gives a toxicity in [0, 1]; 0.5 or above counts as toxic. Of more
than 40 texts the table shows the 20 that any judge rates highest. Below it are
the mean and the number of toxic texts by each judge.

Line n of a text file is text n; a blank line is an empty text. Only \\n and
\\r\\n end a line.

--jsonl prints the texts in their order, in ASCII. Each object has the keys
`index` (counted from 1), `text` and one per judge.

Known insults keep only their first letter, and so does every word that a judge
in use rates 0.5 or above on its own. This holds for the table and for the key
`text`; --show shows the words."""

_ROWS = (
    Command(
        name="score",
        repeated="TEXT",
        options=_SCORE,
        execute=_score,
        summary="Rate how toxic texts are, in seconds; try this first",
        details=_SCORE_DETAILS,
    ),
    Command(
        name="run",
        positionals=("RECIPE",),
        options=(*_NEW_RUN, *_RESUME, _TRACK),
        takes_settings=True,
        execute=_run,
        summary="Run all stages: prepare, sft, train, evaluate, report",
    ),
    Command(
        name="sweep",
        positionals=("RECIPE",),
        options=(*_NEW_RUN, *_RESUME, _TRACK, *_SWEEP),
        takes_settings=True,
        execute=_sweep,
        summary="Run every combination of given values and seeds, and compare the results",
    ),
    Command(
        name="doctor",
        positionals=("RECIPE",),
        options=_NEW_RUN,
        takes_settings=True,
        execute=_doctor,
        summary="Estimate memory and time of a run, and try each of its parts; creates no run folder",
    ),
    Command(
        name="fit",
        positionals=("SOURCE",),
        options=_FIT,
        execute=_fit,
        summary="Fit a classifier or scorer to labelled texts: a reward or judge of your own",
        details=_FIT_DETAILS,
    ),
    Command(
        name="recipes",
        execute=_recipes,
        summary="List the recipes",
    ),
    Command(
        name="prepare",
        positionals=("RECIPE",),
        options=_NEW_RUN,
        takes_settings=True,
        execute=_prepare,
        summary="Stage 1: create a run folder with prompts and, if embedded, the reward model",
    ),
    Command(
        name="sft",
        positionals=("RUN",),
        execute=_rerun_stage,
        summary="Stage 2: warm-start the policy, and fine-tune the baselines without RL",
    ),
    Command(
        name="train",
        positionals=("RUN",),
        options=(_TRACK,),
        execute=_rerun_stage,
        summary="Stage 3: train the policy against the reward",
    ),
    Command(
        name="evaluate",
        positionals=("RUN|RECIPE",),
        options=(*_NEW_RUN, _TRACK, *_EVALUATE),
        takes_settings=True,
        execute=_evaluate,
        summary="Stage 4: measure before and after on held-out prompts; also other models, or texts",
        details=_EVALUATE_DETAILS,
    ),
    Command(
        name="report",
        positionals=("RUN",),
        execute=_rerun_stage,
        summary="Stage 5: write report.html",
    ),
    Command(
        name="export",
        positionals=("RUN",),
        options=_EXPORT,
        execute=_export,
        summary="Write the trained LoRA adapter or model with its model card; --push uploads it to the hub",
    ),
    Command(
        name="convert",
        positionals=("FROM", "TO"),
        execute=_convert,
        summary="Convert a GGUF model, or an old model or LoRA adapter (.bin), to safetensors",
        details=_CONVERT_DETAILS,
    ),
)
COMMANDS = {command.name: command for command in _ROWS}


# Parse, call, exit code


def main(words: Sequence[str] | None = None) -> None:
    """Run one command. Exits with 1 if it failed, 2 for bad input, 130 or 143 if stopped. Bugs keep their traceback."""
    words = sys.argv[1:] if words is None else words
    try:
        with stop_signals():
            if several_processes():
                from detoxrl.runtime.world import run_in_world

                run_in_world(partial(_dispatch, words))
            else:
                _dispatch(words)
    except DetoxrlError as error:
        code = 2 if isinstance(error, InputError) else 1
        sys.exit(_complain("; ".join([str(error), *getattr(error, "__notes__", [])]), code))
    except KeyboardInterrupt as stop:
        what, code = ("terminated", 143) if isinstance(stop, Terminated) else ("interrupted", 130)
        notes = getattr(stop, "__notes__", ["nothing was started"])
        sys.exit(_complain("; ".join([what, *notes]), code))
    except BrokenPipeError:  # the reader of our output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _dispatch(words: Sequence[str]) -> None:
    name = words[0] if words else "help"
    if name in ("-h", "--help", "help"):
        print(overview(COMMANDS.values()), end="")
        return
    if name == "--version":
        print(__version__)
        return

    remedy = did_you_mean(name, [*COMMANDS, "help"], f"choose from {', '.join(COMMANDS)}")
    require(name in COMMANDS, "command", name, "is not a command", remedy)
    command = COMMANDS[name]
    request = parse(command, words[1:])

    if "help" in request.options:
        config = recipe(request.target) if request.target in recipe_names() else None
        print(command_help(command, config), end="")
    else:
        command.execute(request)


def several_processes() -> bool:
    """Return whether a launcher (torchrun, accelerate launch) started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _complain(message: str, code: int) -> int:
    """Print why the command ends and return its exit code. Of several processes only the main one prints."""
    if os.environ.get("RANK", "0") == "0":
        print(f"detoxrl: {message}", file=sys.stderr)
    return code
