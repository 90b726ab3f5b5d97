"""What does each command do?"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from detoxrl import __version__
from detoxrl.config import Config
from detoxrl.errors import DetoxrlError, InputError
from detoxrl.recipes import recipe, recipe_names

USAGE = f"""detoxrl {__version__}: make a text generator less toxic with RL, keep what it says, and prove both

  detoxrl run RECIPE        the main job: prepare, sft, train, evaluate, report
  detoxrl prepare RECIPE    make a run folder: prompts and reward model
  detoxrl sft RUN           warm-start the policy; fine-tune the civil baseline
  detoxrl train RUN         PPO from the warm start against the classifier
  detoxrl evaluate RUN      before and after on held-out prompts, by an independent judge
  detoxrl report RUN        write report.html
  detoxrl recipes           list the recipes
  detoxrl --version

RECIPE is a name from `detoxrl recipes`; RUN is a run folder such as runs/quickstart.
`detoxrl run RECIPE --help` lists every setting with its default. Start with: detoxrl run quickstart
Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted."""


def _recipe_command(command: str, words: Sequence[str]) -> None:
    if not words or words[0].startswith("-"):
        name = words[0] if words else ""
        if name in ("-h", "--help"):
            print(USAGE)
            return
        raise InputError("recipe", name, "is missing", f"say `detoxrl {command} RECIPE`; see `detoxrl recipes`")
    defaults = recipe(words[0])

    def flags(
        *,
        config: Annotated[Config, tyro.conf.arg(name="")] = defaults,
        run_dir: Path | None = None,
        overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    ) -> tuple[Config, Path, bool]:
        """Every setting of the recipe can be changed by a flag.

        Args:
            config: The recipe's settings.
            run_dir: Run folder; default runs/RECIPE.
            overwrite: Replace an existing run folder.
        """
        return config, run_dir or Path("runs") / config.recipe, overwrite

    config, run_dir, overwrite = tyro.cli(flags, prog=f"detoxrl {command} {words[0]}", args=list(words[1:]))
    _prepare_libraries()
    from detoxrl import stages

    if command == "prepare":
        stages.prepare(run_dir, config, overwrite)
        print(f"prepared {run_dir}; next: detoxrl sft {run_dir}")
        return
    stages.run(run_dir, config, overwrite)
    _print_result(run_dir)


def _stage_command(command: str, words: Sequence[str]) -> None:
    if len(words) != 1 or words[0].startswith("-"):
        raise InputError("run folder", " ".join(words), "must be one folder", f"say `detoxrl {command} runs/NAME`")
    root = Path(words[0])
    _prepare_libraries()
    from detoxrl import stages

    if command == "sft":
        stages.sft(root)
        print(f"warm start ready in {root}; next: detoxrl train {root}")
    elif command == "train":
        stages.train(root)
        print(f"trained adapter in {root / 'adapter'}; next: detoxrl evaluate {root}")
    elif command == "evaluate":
        stages.evaluate(root)
        print(f"measured: {root / 'eval.json'}; next: detoxrl report {root}")
    else:
        stages.report(root)
        _print_result(root)


def _print_result(root: Path) -> None:
    from detoxrl.report.table import print_result

    print_result(root)


def _prepare_libraries() -> None:
    # OpenMP threads spin while they wait; where cores are shared with another job, two spinning teams slow each other
    # down a hundredfold (docs/log.md). It must be said before torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    # Progress bars and notices of others would tear ours apart; their errors still come through.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _dispatch(words: Sequence[str]) -> None:
    command = words[0] if words else "--help"
    if command in ("-h", "--help", "help"):
        print(USAGE)
    elif command == "--version":
        print(__version__)
    elif command == "recipes":
        for name, purpose in recipe_names().items():
            print(f"{name:<12} {purpose}")
    elif command in ("run", "prepare"):
        _recipe_command(command, words[1:])
    elif command in ("sft", "train", "evaluate", "report"):
        _stage_command(command, words[1:])
    else:
        raise InputError("command", command, "is not a command", "see `detoxrl --help`")


def main(words: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 done, 1 failed, 2 bad input, 130 interrupted. Bugs keep their traceback."""
    try:
        _dispatch(sys.argv[1:] if words is None else words)
    except InputError as error:
        sys.exit(_complain(str(error), 2))
    except DetoxrlError as error:
        sys.exit(_complain(str(error), 1))
    except KeyboardInterrupt:
        sys.exit(_complain("interrupted; stages that finished are kept in the run folder", 130))


def _complain(message: str, code: int) -> int:
    print(f"detoxrl: {message}", file=sys.stderr)
    return code
