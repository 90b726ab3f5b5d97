"""How do judges compare with Perspective, with people and with each other? Prints tables in Markdown.

    python benchmarks/evaluation/judges.py SETS                                    the judges of the package
    python benchmarks/evaluation/judges.py SETS --judge alt-profanity-check some/classifier=toxic
    python benchmarks/evaluation/judges.py SETS --only perspective speed           some tables

SETS is a folder with one folder per set, such as davidson or realtoxicityprompts_sample; judged_sets.py lists them. A
set that is missing is skipped. No text is printed. docs/judges.md shows the tables.

A judge that `detoxrl fit` made of RealToxicityPrompts has to be measured on the texts that it did not see: give
--held-out and --seed as they were given to the fit.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blind_spots import disguises, identity, languages
from detoxrl.config.judges import JUDGES, PERSPECTIVE_SCORES
from detoxrl.config.judges import PERSPECTIVE as PERSPECTIVE_MINILM
from detoxrl.errors import DetoxrlError, InputError, require
from detoxrl.evaluation.judges import judge_source, load_judges
from detoxrl.runtime.console import log, status
from detoxrl.runtime.shipped import MODELS
from judge_measures import Benchmark, TableMaker, to_markdown
from judge_speed import speed
from judged_sets import DIASAFETY, PERSPECTIVE, TOXIGEN
from label_tables import context, groups, sets
from perspective_tables import judge_agreement, lengths, perspective, reliability_bins, several_scores

TABLES: dict[str, TableMaker] = {
    "perspective": perspective,
    "reliability": reliability_bins,
    "scores": several_scores,
    "sets": sets,
    "groups": groups,
    "context": context,
    "disguise": disguises,
    "languages": languages,
    "length": lengths,
    "agreement": judge_agreement,
    "speed": speed,
    "identity": identity,
}
_FOLDERS = {
    **dict.fromkeys(("perspective", "reliability", "scores", "length", "agreement"), PERSPECTIVE),
    "groups": TOXIGEN.folder,
    "context": DIASAFETY.folder,
}
"""The set that a table needs."""


def packaged_fit() -> dict[str, Any]:
    """Return the settings by which perspective-minilm was fitted."""
    settings: dict[str, Any] = json.loads((MODELS / "perspective/fit.json").read_text(encoding="utf-8"))["settings"]
    return settings


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", metavar="SETS", type=Path, help="folder of data sets")
    parser.add_argument(
        "--judge", nargs="+", default=list(JUDGES), metavar="NAME", help=f"{', '.join(JUDGES)} or SOURCE=LABEL"
    )
    parser.add_argument(
        "--scores-of",
        metavar="NAME",
        help="judge, folder or hub id with several of Perspective's scores (default: perspective-minilm, if asked)",
    )
    parser.add_argument(
        "--score-labels", nargs="+", choices=PERSPECTIVE_SCORES, default=PERSPECTIVE_SCORES, help="which of its scores"
    )
    parser.add_argument(
        "--only", nargs="+", choices=TABLES, metavar="TABLE", help=f"print only these: {', '.join(TABLES)}"
    )
    parser.add_argument("--texts", type=int, default=4000, help="maximum number of texts of a set")
    packaged = packaged_fit()
    parser.add_argument(
        "--held-out",
        type=float,
        default=packaged["held_out"],
        help="as in the fit of a judge; half of it is measured (default: that of perspective-minilm)",
    )
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap")
    parser.add_argument(
        "--seed",
        type=int,
        default=packaged["seed"],
        help="of the held-out texts, as in the fit of a judge, and of all draws (default: that of perspective-minilm)",
    )
    options = parser.parse_args(arguments)
    if options.scores_of is None and PERSPECTIVE_MINILM in options.judge:
        options.scores_of = PERSPECTIVE_MINILM
    return options


def requested_tables(options: argparse.Namespace) -> dict[str, TableMaker]:
    """Return the tables that were asked for, without those that cannot be made; a line on stderr says why."""
    requested = {}
    for name in options.only or TABLES:
        folder = _FOLDERS.get(name)
        if name == "scores" and options.scores_of is None:
            log.print("skipped scores: name a judge that has several with --scores-of", soft_wrap=True)
        elif folder and not (options.sets / folder).is_dir():
            log.print(f"skipped {name}: {options.sets} has no folder {folder}", soft_wrap=True)
        else:
            requested[name] = TABLES[name]
    return requested


def print_tables(options: argparse.Namespace) -> None:
    """Print the tables. Raises InputError for a folder, a set or a judge that cannot be used."""
    require(options.sets.is_dir(), "SETS", str(options.sets), "is not a folder", "give the folder of the data sets")
    require(options.texts > 0, "--texts", options.texts, "must be above 0", "4000 is the default")
    require(options.resamples > 0, "--resamples", options.resamples, "must be above 0", "1000 is the default")
    require(options.seed >= 0, "--seed", options.seed, "must not be negative", "give 0 or more")

    remedy = "a classifier needs = and its toxic label"
    sources = [judge_source(name, "--judge", remedy) for name in dict.fromkeys(options.judge)]
    tables = requested_tables(options)
    with status("loading judges"):
        loaded = load_judges(sources)

    benchmark = Benchmark(
        root=options.sets,
        loaded=loaded,
        scores_of=options.scores_of,
        score_labels=options.score_labels,
        texts=options.texts,
        held_out=options.held_out,
        resamples=options.resamples,
        seed=options.seed,
    )
    for name, make in tables.items():
        log.print(f"measuring {name}", soft_wrap=True)
        table = make(benchmark)
        if table.rows:
            print(to_markdown(name, table), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    try:
        print_tables(options)
    except DetoxrlError as error:
        log.print(str(error), soft_wrap=True)
        sys.exit(2 if isinstance(error, InputError) else 1)


if __name__ == "__main__":
    main()
