"""What does each command do?"""

import errno
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from safetensors import SafetensorError

from detoxrl import __version__
from detoxrl.arguments import USAGE, WORDS, Given, parse, parser_of
from detoxrl.config.edit import closest_match, config_from_json, with_settings
from detoxrl.config.recipes import recipe, recipe_names
from detoxrl.config.schema import Config
from detoxrl.errors import DetoxrlError, InputError, ProcessError, require
from detoxrl.runtime.signals import Terminated, resume_hint, stop_signals

_DONE = {
    "prepare": "prepared {root}; next: detoxrl sft {root}",
    "sft": "warm start ready in {root}; next: detoxrl train {root}",
    "train": "trained policy in {root}/adapter; next: detoxrl evaluate {root}",
    "evaluate": "measured: {root}/eval.json; next: detoxrl report {root}",
}


def _on_recipe(command: str, name: str, settings: Given, given: Given) -> None:
    """Make a run folder, or try what would be made, by a recipe and the flags that change it."""
    with _kept(given.get("run_dir", Path("runs", name))):
        config = with_settings(_defaults(command, name, given), settings)
    usual = {"sweep": "sweep", "evaluate": "texts" if "texts" in given else f"{config.recipe}-measured"}
    root = given.get("run_dir", Path("runs", usual.get(command, config.recipe)))
    how: Given = {flag: flag in given for flag in ("overwrite", "resume", "accept_changes")}
    how["track"] = given.get("track")
    fits = command != "evaluate" or how["track"] is None
    require(fits, "--track", how["track"], "does not go with a recipe or texts that are measured", "leave it out")
    fits = not (how["overwrite"] and how["resume"])
    require(fits, "--resume", True, "does not go with --overwrite", "choose one of them")
    fits = how["resume"] or not how["accept_changes"]
    require(fits, "--accept-changes", True, "goes with --resume alone", "add --resume, or leave it out")
    with _kept(root):
        from detoxrl.commands import doctor, sweep
        from detoxrl.commands import run as stages
        from detoxrl.report.terminal import print_result

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
        from detoxrl.runtime.run_folder import RunFolder

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
        from detoxrl.commands import measure as measuring
        from detoxrl.commands import run as stages
        from detoxrl.report.terminal import print_result
        from detoxrl.runtime.run_folder import RunFolder

        require(track is None or not given, "--track", track, "does not go with --power or --policy", "leave it out")
        if "power" in given:
            print(measuring.needed_prompts(root, given["power"]))
            return
        if settings:
            stages.run(root, with_settings(RunFolder.open(root)[1], settings), resume=True, track=track)
        if "policy" in given:
            stages.evaluate(root, policies=_named("policy", given))
        if not settings and not given:
            stages.rerun_stage(root, command, track=track)
        if command == "report" or settings or given:
            print_result(root)
        else:
            print(_DONE[command].format(root=root))


def _export(name: str, given: Given) -> None:
    require(name != "", "run folder", name, "is missing", "say `detoxrl export runs/NAME`")
    with _kept(None):
        from detoxrl.commands.export import export

        flags = {flag: flag in given for flag in ("merged", "private", "overwrite")}
        made = export(name, to=given.get("to"), push=given.get("push"), **flags)
    print(f"{made.what}: {made.folder}")
    shared = f"; look at {made.address}" if made.address else ", then share it: --overwrite --push OWNER/NAME"
    print(f"next: read {made.folder / 'README.md'}{shared}")


@contextmanager
def _kept(root: Path | None) -> Iterator[None]:
    """Say what is kept and how to go on when a run is stopped or the disk is full."""
    try:
        with stop_signals():
            yield
    except (KeyboardInterrupt, ProcessError) as stop:
        if not getattr(stop, "__notes__", []):
            stop.add_note(_how_to_go_on(root))
        raise
    except (OSError, SafetensorError) as error:
        # safetensors wraps the system's error in one of its own.
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error):
            sys.exit(_complain(f"the disk is full; {_how_to_go_on(root)}", 1))
        raise


def _how_to_go_on(root: Path | None) -> str:
    if root is None:
        return "nothing half made is left"
    command = "sweep" if (root / "sweep.json").is_file() else "run"
    if command == "run" and not (root / "config.json").is_file():
        return "nothing was written"
    kept = ", ".join(sorted(path.name for path in root.iterdir() if not path.name.startswith(".")))
    return f"{root} keeps {kept}; {resume_hint(root, command)}"


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
        remedy = closest_match(command, [*WORDS, "recipes", "help"], "see `detoxrl --help`")
        require(command in WORDS, "command", command, "is not a command", remedy)
        settings, given = parse(command, words[1:])
        _obey(command, settings, given)


def _obey(command: str, settings: Given, given: Given) -> None:
    name = given.pop(WORDS[command].split()[0], "")
    subjects = given.keys() & {"policy", "texts"} and not (name and Path(name, "config.json").is_file())
    if "help" in given:
        print(parser_of(command, recipe(name) if name in recipe_names() else None).format_help(), end="")
    elif command == "convert":
        require("TO" in given, "words", name, "must be two", "say `detoxrl convert FROM TO`, two folders")
        from detoxrl.commands.convert import convert

        print(f"{given['TO']}: {convert(name, Path(given['TO']))}; next: name that folder where you named {name}")
    elif command == "export":
        _export(name, given)
    elif WORDS[command] == "RECIPE" or subjects:
        require("power" not in given, "--power", given.get("power"), "does not go with evaluate RECIPE", "name a run")
        _on_recipe(command, name, settings, given)
    else:
        _on_run(command, name, settings, given)


def main(words: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 done, 1 failed, 2 bad input, 130 and 143 stopped. Bugs keep their traceback."""
    try:
        words = sys.argv[1:] if words is None else words
        with stop_signals():
            if several_processes():
                from detoxrl.training.helping import led

                led(partial(_dispatch, words))
            else:
                _dispatch(words)
    except DetoxrlError as error:
        code = 2 if isinstance(error, InputError) else 1
        sys.exit(_complain("; ".join([str(error), *getattr(error, "__notes__", [])]), code))
    except KeyboardInterrupt as stop:
        what, code = ("terminated", 143) if isinstance(stop, Terminated) else ("interrupted", 130)
        sys.exit(_complain("; ".join([what, *getattr(stop, "__notes__", ["nothing was begun"])]), code))
    except BrokenPipeError:  # whoever read our output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def several_processes() -> bool:
    """Return whether a launcher (torchrun, accelerate launch) started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _complain(message: str, code: int) -> int:
    if os.environ.get("RANK", "0") == "0":  # of several processes the main one speaks
        print(f"detoxrl: {message}", file=sys.stderr)
    return code
