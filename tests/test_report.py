"""Does the report say what the run folder holds, safely and on its own?"""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from detoxrl.errors import InputError
from detoxrl.report.build import build_report, flatten, mask_pattern, number, segments, signed

JUDGE = "alt-profanity-check"


class _Visible(HTMLParser):
    """Collects the text a reader sees, one string per element and one per table row."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.hidden = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden = tag in ("style", "script")
        if tag == "tr":
            self.texts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.texts.append(data.strip("\n"))


def visible(html: str) -> str:
    """Return the text a reader sees, one line per table row."""
    parser = _Visible()
    parser.feed(html)
    return "".join(parser.texts)


def change(before: float, after: float) -> dict[str, Any]:
    difference = after - before
    return {
        "before": before,
        "after": after,
        "difference": {"mean": difference, "low": difference - 0.02, "high": difference + 0.02},
    }


def toxicity(before: float, after: float, verdict: str, floor: float | None = 0.04) -> dict[str, Any]:
    sides = {
        side: {"mean": mean, "std": 0.1, "toxic_ratio": mean, "max": 0.9}
        for side, mean in (("before", before), ("after", after))
    }
    removed = None if floor is None else (before - after) / (before - floor)
    relative = after / before - 1
    extra = {"floor": floor, "share_removed": removed, "relative": relative, "verdict": verdict}
    return change(before, after) | sides | extra


def sample(
    name: str, before: tuple[str, float], after: tuple[str, float], prompt: str = "Ann: Hello."
) -> dict[str, Any]:
    scores = {"before": [before[1], 0.5], "after": [after[1], 0.5]}
    return {
        "id": name,
        "dialogue": prompt,
        "reference": "Ann calls Bob a pig.",
        "civil_reference": None,
        "responses": {"before": [before[0], "x"], "after": [after[0], "x"]},
        "toxicity": {JUDGE: scores, "reward classifier": scores},
    }


EVALUATION = {
    "n_prompts": 3,
    "samples_per_prompt": 2,
    "primary_judge": JUDGE,
    "toxicity": {JUDGE: toxicity(0.27, 0.05, "less toxic"),
                 "reward classifier": toxicity(0.4, 0.1, "less toxic", None)},
    "quality": {"facts": change(0.91, 0.9), "length": change(24.0, 23.5)},
    "splits": {"with facts": {"n": 2, "toxicity": change(0.5, 0.1), "facts": change(0.8, 0.7)},
               "without": {"n": 1, "toxicity": change(0.1, 0.1)}},
    "baselines": {"sft_civil": {"toxicity": {JUDGE: toxicity(0.27, 0.15, "less toxic")},
                                "quality": {"facts": change(0.91, 0.88)}}},
    "seconds": {"prepare": 1.5, "train": 123.0},
    "versions": {"torch": "2.8.0"},
    "machine": "two cores",
}  # fmt: skip
SAMPLES = [
    sample("worse", ("Bob was late.", 0.1), ("Ann calls Bob a Clown.", 0.8)),
    sample("better", ("Ann calls Bob an idiot.", 0.9), ("Bob was late & sorry.", 0.1), "Ann: You idiots! <i>Pigs!</i>"),
    sample("same", ("", 0.3), ("<script>alert(1)</script>", 0.3)),
]
METRICS = [
    {"step": 0, "score/mean": 0.1, "kl/reference": 0.0},
    {"step": 1, "score/mean": 0.4, "kl/reference": 1.2},
]
VALIDATIONS = [{"step": 0, "toxicity": 0.3, "quality": 0.9}, {"step": 2, "toxicity": 0.1, "quality": 0.9}]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    config = {"recipe": "quickstart", "seed": 7, "rl": {"lr": 0.001}, "policy": {"lora_targets": ["q", "v"]}}
    write(tmp_path, "config.json", config)
    write(tmp_path, "checkpoint.json", {"kept_step": 2, "reason": "least toxic on validation"})
    write(tmp_path, "eval.json", EVALUATION)
    write(tmp_path, "masked_words.json", ["idiot", "pig", "clown"])
    write_lines(tmp_path, "metrics.jsonl", METRICS)
    write_lines(tmp_path, "validation.jsonl", VALIDATIONS)
    write_lines(tmp_path, "samples.jsonl", SAMPLES)
    return tmp_path


def write(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


def write_lines(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def built(run_dir: Path) -> str:
    return build_report(run_dir).read_text(encoding="utf-8")


def prompt_table(html: str, name: str) -> str:
    return html.partition(f'id="{name}"')[2].partition("</table>")[0]


def test_report_is_one_file_and_the_same_each_time(run_dir: Path) -> None:
    files = {path.name for path in run_dir.iterdir()}
    first = built(run_dir)
    assert built(run_dir) == first
    assert {path.name for path in run_dir.iterdir()} == files | {"report.html"}


def test_report_refers_to_nothing_outside(run_dir: Path) -> None:
    html = built(run_dir)
    assert not re.search(r"https?:|\bsrc\s*=|<link|@import|//[a-z]+\.", html)
    assert set(re.findall(r'href="(.)', html)) == {"#"}
    ids = re.findall(r'\sid="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_model_text_is_escaped(run_dir: Path) -> None:
    html = built(run_dir)
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "<i>" not in html
    assert "Bob was late &amp; sorry." in html


def test_insults_are_masked_until_clicked(run_dir: Path) -> None:
    html = built(run_dir)
    assert not re.search(r"idiot|pig|clown", visible(html), re.IGNORECASE)
    assert "Ann calls Bob a C****." in visible(html)
    assert "You i*****! <i>P***!</i>" in visible(html)
    assert 'data-word="idiots"' in html


def test_insult_at_the_edge_of_an_excerpt_is_masked(run_dir: Path) -> None:
    prompts = ["a " * words + "idiot " * 30 for words in range(10)]
    write_lines(run_dir, "samples.jsonl", [sample("a", ("x", 0.1), ("x", 0.1), prompt) for prompt in prompts])
    assert "idio" not in visible(built(run_dir))


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("You idiot!", ["idiot"]),
        ("IDIOTS and _Pigs_", ["IDIOTS", "Pigs"]),
        ("a pigeon, idiotic", []),
        ("crybabies, crybaby", ["crybabies", "crybaby"]),
        ("a < b & c &amp; d", []),
    ],
)
def test_masking_finds_whole_words_and_loses_no_text(text: str, masked: list[str]) -> None:
    found = segments(text, mask_pattern(["idiot", "pig", "crybaby", "lt"]))
    assert [segment.text for segment in found if segment.masked] == masked
    assert "".join(segment.text for segment in found) == text


@pytest.mark.parametrize(
    ("before", "after", "verdict", "words"),
    [
        (0.27, 0.05, "less toxic",
         "Less toxic: mean toxicity by alt-profanity-check fell from 0.27 to 0.05 "
         "(difference −0.22, 95 % interval −0.24 to −0.20; 3 prompts, 2 samples each)"),
        (0.1, 0.4, "more toxic",
         "More toxic: mean toxicity by alt-profanity-check rose from 0.10 to 0.40 "
         "(difference +0.30, 95 % interval +0.28 to +0.32; 3 prompts, 2 samples each)"),
        (0.1, 0.095, "no detectable difference",
         "No detectable difference: mean toxicity by alt-profanity-check was 0.100 before and 0.095 after "
         "(difference −0.005, 95 % interval −0.025 to +0.015; 3 prompts, 2 samples each)"),
    ],
)  # fmt: skip
def test_headline_says_what_the_interval_shows(
    run_dir: Path, before: float, after: float, verdict: str, words: str
) -> None:
    judged = EVALUATION["toxicity"] | {JUDGE: toxicity(before, after, verdict)}  # type: ignore[operator]
    write(run_dir, "eval.json", EVALUATION | {"toxicity": judged})
    assert words in visible(built(run_dir))


def test_judges_are_told_apart_by_independence(run_dir: Path) -> None:
    rows = visible(built(run_dir)).splitlines()
    (reward,) = [row for row in rows if row.startswith("reward classifier")]
    (primary,) = [row for row in rows if row.startswith(JUDGE)]
    assert "not independent" in reward
    assert "—" in reward  # no floor, no share removed
    assert "primary, independent" in primary
    assert "96 %" in primary  # of 0.27 - 0.04 above the floor, 0.22 are gone


def test_baseline_stands_next_to_rl(run_dir: Path) -> None:
    text = visible(built(run_dir))
    assert "Supervised on civil references" in text
    (row,) = [row for row in text.splitlines() if row.startswith(f"Toxicity by {JUDGE}")]
    assert re.findall(r"0\.\d{3}", row)[:2] == ["0.270", "0.050"]
    assert "0.150" in row


def test_kept_step_is_marked_in_every_curve(run_dir: Path) -> None:
    html = built(run_dir)
    curves = html.partition("Learning curves")[2].partition("Distribution of toxicity")[0]
    assert curves.count("<svg") == 4
    assert curves.count("kept: step 2<") == 4


def test_prompts_are_sorted_by_improvement(run_dir: Path) -> None:
    differences = re.findall(r'data-value="([^"]+)"', prompt_table(built(run_dir), "all"))
    assert [round(float(value), 2) for value in differences] == [-0.8, 0, 0.7]


def test_regressions_are_listed(run_dir: Path) -> None:
    table = prompt_table(built(run_dir), "regressions")
    assert table.count("<tr><td>") == 1
    assert "+0.70" in table


def test_no_regressions_are_said_in_words(run_dir: Path) -> None:
    write_lines(run_dir, "samples.jsonl", SAMPLES[1:])
    html = built(run_dir)
    assert 'id="regressions"' not in html
    assert "None: no first sample became more toxic" in visible(html)


def test_at_most_ten_regressions_largest_first(run_dir: Path) -> None:
    write_lines(run_dir, "samples.jsonl", [sample(str(i), ("x", 0.1), ("x", 0.2 + i / 20)) for i in range(12)])
    differences = re.findall(r'data-value="([^"]+)"', prompt_table(built(run_dir), "regressions"))
    assert [round(float(value), 2) for value in differences] == [round(0.65 - i / 20, 2) for i in range(10)]


def test_optional_parts_may_be_missing(run_dir: Path) -> None:
    bare = {"quality": {"rouge_l": change(0.5, 0.4)}, "baselines": {}, "splits": {}}
    write(run_dir, "eval.json", EVALUATION | bare)
    write_lines(run_dir, "metrics.jsonl", [{"step": 0, "score/mean": 0.1}])
    text = visible(built(run_dir))
    assert "ROUGE-L" in text
    assert "Facts kept went" not in text
    assert "Against the baseline" not in text


def test_unfinished_run_names_the_stage_to_run(run_dir: Path) -> None:
    (run_dir / "eval.json").unlink()
    with pytest.raises(InputError, match=r"has no eval\.json; run `detoxrl evaluate"):
        build_report(run_dir)


def test_settings_and_command_are_shown(run_dir: Path) -> None:
    text = visible(built(run_dir))
    assert "detoxrl run quickstart --seed 7 --rl.lr 0.001" in text
    assert "rl.lr0.001" in text
    assert "policy.lora_targetsq, v" in text
    assert "2 min 04 s in total" in text


def test_numbers_round_without_a_negative_zero() -> None:
    assert [number(-0.0001, 2), number(-0.25, 2), number(None)] == ["0.00", "−0.25", "—"]
    assert [signed(-0.0001, 2), signed(0.004, 2), signed(0.25, 2)] == ["0.00", "0.00", "+0.25"]


def test_settings_flatten_to_dotted_keys() -> None:
    assert flatten({"a": {"b": {"c": 1}}, "d": 2}) == {"a.b.c": 1, "d": 2}
