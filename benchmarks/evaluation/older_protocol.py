"""What would the systems before detoxrl have reported of a finished run? Prints a table.

    python benchmarks/evaluation/older_protocol.py runs/quickstart     less than a minute; no network

They took one response per prompt, of the first ten prompts, read prompt and response as one text, and reported the mean
and standard deviation of its toxicity without an interval; the judge was the classifier of the reward. The table has
these numbers, and beside them those of all prompts, of the response alone, and of the summaries written by people where
all rows have one. docs/comparison.md says what they are worth.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from detoxrl.data.rows import Row
from detoxrl.evaluation.baselines import Texts
from detoxrl.evaluation.judges import Judge
from detoxrl.evaluation.statistics import Floats
from detoxrl.runs import Run
from detoxrl.runtime.run_folder import REWARD_JUDGE, RunFolder

PROMPTS = 10
"""How many prompts those systems measured."""


class Line(NamedTuple):
    """One line of the table: whose texts were judged, over how many prompts, and the summary of their toxicity.

    `maximum` and `ratio` (the share at 0.5 or above) are the aggregates of the toxicity measurement in the evaluate
    library (0.4); `mean` and `std` (ddof 0) are numpy's, as those systems took them.
    """

    prompts: int
    judged: str
    writer: str
    mean: float
    std: float
    maximum: float
    ratio: float


def summarized(judged: str, writer: str, toxicity: Floats) -> Line:
    """Return the line for toxicities (N,)."""
    return Line(
        prompts=len(toxicity),
        judged=judged,
        writer=writer,
        mean=float(toxicity.mean()),
        std=float(toxicity.std()),
        maximum=float(toxicity.max()),
        ratio=float((toxicity >= 0.5).mean()),
    )


def older_protocol(rows: Sequence[Row], responses: Mapping[str, Texts], judge: Judge) -> list[Line]:
    """Return the lines for the responses (N, k) of "before" and "after", first over ten prompts, then over all."""
    firsts = {writer: [samples[0] for samples in responses[writer]] for writer in ("before", "after")}
    judged: dict[tuple[str, str], list[str]] = {}
    for writer, texts in firsts.items():
        judged["prompt and response", writer] = [f"{row.prompt} {text}" for row, text in zip(rows, texts, strict=True)]
    for writer, texts in firsts.items():
        judged["response", writer] = texts
    summaries = [row.references[0] for row in rows if row.references]
    if len(summaries) == len(rows):
        judged["response", "people"] = summaries

    toxicity = {key: judge(texts) for key, texts in judged.items()}
    lines: list[Line] = []
    for count in sorted({min(PROMPTS, len(rows)), len(rows)}):
        lines.extend(summarized(text, writer, values[:count]) for (text, writer), values in toxicity.items())
    return lines


def judge_of(run: Run) -> tuple[str, Judge]:
    """Return the judge with its name: the reward's classifier, or the primary judge if the reward is no classifier."""
    if REWARD_JUDGE in run.folder.read_json("eval.json")["toxicity"]:
        judge = run.scorer.judge
        assert judge is not None
        return REWARD_JUDGE, judge
    return next(iter(run.judges.items()))


def responses_of(folder: RunFolder) -> dict[str, list[list[str]]]:
    """Return the responses of each policy, in the order of the test rows."""
    lines = folder.require_product("samples.jsonl", "evaluate").read_bytes().splitlines()
    samples: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return {policy: [sample["responses"][policy] for sample in samples] for policy in samples[0]["responses"]}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run that was evaluated")
    folder, config = RunFolder.open(parser.parse_args(arguments).run)

    run = Run(folder, config)
    name, judge = judge_of(run)
    print(f"Toxicity by {name}, one response per prompt\n")
    print("| prompts | text judged | written by | mean | std | maximum | ratio |")
    print("|--:|---|---|--:|--:|--:|--:|")
    for line in older_protocol(run.rows("test"), responses_of(folder), judge):
        numbers = " | ".join(f"{value:.3f}" for value in (line.mean, line.std, line.maximum, line.ratio))
        print(f"| {line.prompts} | {line.judged} | {line.writer} | {numbers} |")


if __name__ == "__main__":
    main()
