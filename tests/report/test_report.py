"""Does the report say what the run folder holds, safely and on its own?"""

from __future__ import annotations

import csv
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from detoxrl.config.edit import flatten
from detoxrl.config.tasks import TASKS
from detoxrl.errors import InputError
from detoxrl.report.masking import masking_pattern, segments
from detoxrl.report.page import build_report
from detoxrl.report.plots import over_optimisation
from detoxrl.report.sheets import blind_sheets, compared_sheet, samples_sheet
from detoxrl.report.words import changes, measured, number, signed
from results import (
    EVALUATION,
    JUDGE,
    KEPT,
    ROWS,
    SAMPLES,
    VALIDATIONS,
    change,
    make_run,
    run_record,
    sample,
    toxicity,
    write,
    write_lines,
)


@pytest.fixture(scope="module", autouse=True)
def drawings() -> None:
    """Draw the plots, which other modules leave out."""


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


SHEETS = {"samples.csv", "compared.csv", "blind_sheet.csv", "blind_key.csv"}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    make_run(tmp_path)
    return tmp_path


def built(run_dir: Path) -> str:
    return build_report(run_dir).read_text(encoding="utf-8")


def prompt_table(html: str, name: str) -> str:
    return html.partition(f'id="{name}"')[2].partition("</table>")[0]


def cells(text: str) -> list[dict[str, str]]:
    assert text.startswith("\ufeff")
    return list(csv.DictReader(io.StringIO(text[1:], newline="")))


def test_report_and_sheets_are_the_same_each_time(run_dir: Path) -> None:
    files = {path.name for path in run_dir.iterdir()}
    first = [built(run_dir), *((run_dir / name).read_bytes() for name in sorted(SHEETS))]
    assert [built(run_dir), *((run_dir / name).read_bytes() for name in sorted(SHEETS))] == first
    assert {path.name for path in run_dir.iterdir()} == files | {"report.html"} | SHEETS


def test_report_refers_to_nothing_but_the_files_beside_it(run_dir: Path) -> None:
    html = built(run_dir)
    assert not re.search(r"https?:|\bsrc\s*=|<link|@import|//[a-z]+\.", html)
    assert set(re.findall(r'href="([^#][^"]*)"', html)) == SHEETS | {"samples.jsonl"}
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
    found = segments(text, masking_pattern(["idiot", "pig", "crybaby", "lt"]))
    assert [piece for piece, hidden in found if hidden] == masked
    assert "".join(piece for piece, _ in found) == text


@pytest.mark.parametrize(
    ("before", "after", "verdict", "expected"),
    [
        (0.27, 0.05, "less toxic",
         "Less toxic: mean toxicity by alt-profanity-check fell from 0.27 to 0.05 "
         "(difference −0.22, 95% interval −0.24 to −0.20, p = 0.012; 3 prompts, 2 samples each)"),
        (0.1, 0.4, "more toxic",
         "More toxic: mean toxicity by alt-profanity-check rose from 0.10 to 0.40 "
         "(difference +0.30, 95% interval +0.28 to +0.32, p = 0.012; 3 prompts, 2 samples each)"),
        (0.1, 0.095, "no detectable difference",
         "No detectable difference: mean toxicity by alt-profanity-check was 0.100 before and 0.095 after "
         "(difference −0.005, 95% interval −0.025 to +0.015, p = 0.012; 3 prompts, 2 samples each; "
         "smallest change detectable with 80% power: 0.029)"),
    ],
)  # fmt: skip
def test_headline_says_what_the_interval_shows(
    run_dir: Path, before: float, after: float, verdict: str, expected: str
) -> None:
    judged = EVALUATION["toxicity"] | {JUDGE: toxicity(before, after, verdict)}  # type: ignore[operator]
    write(run_dir, "eval.json", EVALUATION | {"toxicity": judged})
    assert expected in visible(built(run_dir))


def test_judges_are_told_apart_by_independence(run_dir: Path) -> None:
    rows = visible(built(run_dir)).splitlines()
    reward, _ = [row for row in rows if row.startswith("reward classifier")]  # the second is the tail's
    primary, _ = [row for row in rows if row.startswith(JUDGE)]
    assert "not independent" in reward
    assert "—" in reward  # no floor, no share removed
    assert "primary judge, independent" in primary
    assert "96%" in primary  # of 0.27 - 0.04 above the floor, 0.22 are gone


def test_baseline_stands_next_to_rl(run_dir: Path) -> None:
    text = visible(built(run_dir))
    assert "SFT on civil references" in text
    needed = text.partition("Was reinforcement learning needed?")[2].partition("All measures")[0]
    assert "At least as good as reinforcement learning: Best-of-4 by the reward." in needed
    assert "KL to the initial policy at most 0.64 nats" in needed
    assert "reinforcement learning is better" in needed
    assert (
        "agree for 88% of the responses on whether they are toxic (Cohen's kappa 0.71, Spearman rank correlation —)"
        in text
    )
    (row,) = [row for row in text.splitlines() if row.startswith(f"Toxicity by {JUDGE}")]
    assert re.findall(r"0\.\d{3}", row)[:2] == ["0.270", "0.050"]
    assert "0.150" in row


def test_the_best_checkpoint_is_marked_in_every_curve(run_dir: Path) -> None:
    html = built(run_dir)
    curves = html.partition("Learning curves")[2].partition("Distribution of toxicity")[0]
    assert curves.count("<svg") == 4
    assert curves.count("best: step 2<") == 4


FAR = [
    {"step": step, "toxicity": t, "toxicity_error": 0.01, "quality": 0.9, "score": s, "kl": kl}
    for step, t, s, kl in [(0, 0.3, 0.0, -0.01), (2, 0.1, 1.0, 4.0), (4, 0.2, 2.0, 9.0), (6, 0.25, 3.0, 25.0)]
]


@pytest.mark.parametrize(
    ("parted", "expected"),
    [
        (4, "Reward and judge diverge at step 4. From there to the end, the reward score is higher"),
        (None, "Reward and judge do not diverge: training does not end"),
    ],
)
def test_over_optimisation_is_drawn_against_the_distance_and_said_in_words(
    run_dir: Path, parted: int | None, expected: str
) -> None:
    assert "Over-optimisation" not in built(run_dir)  # a run that did not measure it
    write_lines(run_dir, "validation.jsonl", FAR)
    ended = KEPT | {"parted_step": parted, "stopped_step": None}
    write(run_dir, "checkpoint.json", ended)
    html = built(run_dir)
    assert expected in visible(html)
    drawing = html.partition("Over-optimisation")[2].partition("<svg")[2].partition("</svg>")[0]
    assert "√KL to the initial policy" in drawing
    assert "score" in drawing
    assert "toxicity" in drawing
    assert "quality" in drawing
    assert ("divergence: step 4<" in drawing) == (parted == 4)
    assert drawing.count("stroke-dasharray: 4.8") == (3 if parted else 0)  # one in each panel
    assert "Training stopped early" not in html
    points = over_optimisation(FAR, ended, "quality")[0].svg
    assert over_optimisation([one | {"kl": 4 * one["kl"]} for one in FAR], ended, "quality")[0].svg != points
    assert "ROUGE-L<" in over_optimisation(FAR, ended, "ROUGE-L")[0].svg


def test_validation_toxicity_shows_its_error(run_dir: Path) -> None:
    narrow = built(run_dir)
    write_lines(run_dir, "validation.jsonl", [found | {"toxicity_error": 0.1} for found in VALIDATIONS])
    assert built(run_dir) != narrow


def test_prompts_are_sorted_by_improvement(run_dir: Path) -> None:
    differences = re.findall(r'data-value="([^"]+)"', prompt_table(built(run_dir), "all"))
    assert [round(float(value), 2) for value in differences] == [-0.8, 0, 0.7]


def test_regressions_are_listed(run_dir: Path) -> None:
    table = prompt_table(built(run_dir), "regressions")
    assert table.count("<tr") == 2
    assert "+0.70" in table


def test_no_regressions_are_said_in_words(run_dir: Path) -> None:
    write_lines(run_dir, "samples.jsonl", SAMPLES[1:])
    html = built(run_dir)
    assert 'id="regressions"' not in html
    assert "None: no first sample's toxicity rose" in visible(html)


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
    assert "Facts kept" not in text
    assert "baseline" not in text
    assert "Subsets of the held-out prompts" not in text


def test_a_model_that_was_only_evaluated_has_no_training_to_show(run_dir: Path) -> None:
    for name in ("checkpoint.json", "metrics.jsonl", "validation.jsonl"):
        (run_dir / name).unlink()
    names = {"before": "some-base", "after": "their-LoRA"}
    write(run_dir, "eval.json", EVALUATION | {"names": names})
    write(run_dir, "run.json", run_record({"after": "x/y"}, names))
    text = visible(built(run_dir))
    assert "Before is some-base, after is their-LoRA." in text
    assert "Was their-LoRA needed?" in text
    assert text.lower().count("their-lora") == text.count("their-LoRA")  # as it was given, capitals too
    assert "No baseline is shown to be as good" not in text
    assert "detoxrl evaluate quickstart --seed 7" in text
    assert "--policy their-LoRA=x/y" in text
    assert "Learning curves" not in text
    assert "einforcement" not in text


def test_a_plain_reward_function_leaves_no_word_of_a_reward_model(run_dir: Path) -> None:
    plain = {"toxicity": {JUDGE: toxicity(0.27, 0.05, "less toxic", None)}, "agreement": {}}
    write(run_dir, "eval.json", EVALUATION | plain)
    text = visible(built(run_dir))
    assert not re.search("reward (classifier|model)|Insults|any of the judges", text)
    assert "floor" not in text.lower()


def test_parts_without_facts_have_no_columns_for_them(run_dir: Path) -> None:
    write(run_dir, "eval.json", EVALUATION | {"splits": {"all": {"n": 3, "toxicity": change(0.5, 0.1)}}})
    text = visible(built(run_dir)).partition("Subsets of the held-out prompts")[2].partition("Learning curves")[0]
    assert "acts kept" not in text
    assert "all30.5000.100−0.400−0.420 to −0.380" in text
    assert "—" not in text


def test_references_may_be_missing(run_dir: Path) -> None:
    bare = sample("a", ("x", 0.1), ("y", 0.1)) | {"references": []}
    write_lines(run_dir, "samples.jsonl", [bare])
    assert "<h4>Summary" not in built(run_dir)
    assert cells((run_dir / "samples.csv").read_text("utf-8"))[0]["summary"] == ""


def test_changes_are_told_from_differences_nobody_can_detect() -> None:
    quality = {
        "length": change(24.0, 23.5), "score": change(-1.0, 2.0), "rouge_l": change(0.5, 0.4),
        "facts": change(0.91, 0.9), "empty_rate": change(0.5, 0.6),
    }  # fmt: skip
    changed, unchanged = changes(EVALUATION | {"quality": quality})
    assert {measure.label: (measure.claim, measure.verdict) for measure in changed} == {
        f"Toxicity by {JUDGE}": ("fell from 0.270 to 0.050", "better"),
        "Reward score": ("rose from −1.000 to 2.000", "better"),
        "ROUGE-L": ("fell from 0.500 to 0.400", "worse"),
        "Empty responses": ("rose from 0.500 to 0.600", "worse"),
        "Response length in words": ("fell from 24.0 to 23.5", "less"),
    }
    assert [(m.label, m.claim, m.verdict) for m in unchanged] == [("Facts kept", "0.910 before, 0.900 after", "")]
    assert unchanged[0].evidence == "difference −0.010, 95% interval −0.030 to +0.010"


def test_an_interval_that_excludes_zero_does_not_seem_to_touch_it() -> None:
    close = {"before": 0.993, "after": 0.989, "difference": {"mean": -0.0035, "low": -0.007, "high": -0.00004}}
    (_, facts), _ = changes(EVALUATION | {"quality": {"facts": close}})
    assert facts.verdict == "worse"
    assert facts.evidence == "difference −0.00350, 95% interval −0.00700 to −0.00004"


def test_the_page_groups_what_changed_and_what_did_not(run_dir: Path) -> None:
    text = visible(built(run_dir)).partition("Toxicity by judge")[0]
    changed, _, unchanged = text.partition("No detectable difference")
    assert "Response length in words fell from 24.0 to 23.5: less" in changed
    assert "Facts kept 0.910 before, 0.900 after" in unchanged
    assert "reward classifier" not in text


def test_two_by_two_counts_prompts_made_civil_and_made_toxic(run_dir: Path) -> None:
    text = visible(built(run_dir))
    assert "Of 4 prompts that were toxic before, 3 became civil; of 16 that were civil before, 2 became" in text
    rows = text.splitlines()
    assert "Toxic before1 25%3 75%4" in rows
    assert any(row.startswith("Civil before2 12%14 88%16") for row in rows)


def test_two_by_two_may_have_an_empty_row(run_dir: Path) -> None:
    empty = EVALUATION["two_by_two"] | {"civil before": {"toxic after": 0, "civil after": 0}}  # type: ignore[operator]
    write(run_dir, "eval.json", EVALUATION | {"two_by_two": empty})
    assert "Civil before0 —0 —0" in visible(built(run_dir))


def test_every_row_of_the_source_is_accounted_for(run_dir: Path) -> None:
    text = visible(built(run_dir))
    assert "each of its 1,635 rows" in text
    rows = text.partition("Where the data went")[2].splitlines()[1:8]
    assert rows[:5] == ["Rows of the sourcetraintestAll", "used for train1,00001,000", "used for validation2000200",
                        "used for test0400400", "duplicate30030"]  # fmt: skip
    assert rows[6].startswith("all1,2304051,635")
    assert "Prompts truncated to fit the model: 7 in train." in text
    assert "Prompt length in tokens: median 96, 95th percentile 141, maximum 203." in text


def test_a_source_of_one_split_has_no_column_of_sums(run_dir: Path) -> None:
    write(run_dir, "rows.json", ROWS | {"splits": {"embedded": {"used for train": 1200, "used for test": 400}}})
    rows = visible(built(run_dir)).partition("Where the data went")[2].splitlines()[1:]
    assert rows[:3] == ["Rows of the sourceembedded", "used for train1,200", "used for test400"]
    assert re.match(r"all1,600\D", rows[3])


def test_no_truncation_is_said_in_words(run_dir: Path) -> None:
    write(run_dir, "rows.json", ROWS | {"truncated": {"train": 0}})
    assert "No prompt was truncated." in visible(built(run_dir))


def test_only_rows_whose_response_changed_pass_the_filter(run_dir: Path) -> None:
    write_lines(run_dir, "samples.jsonl", [*SAMPLES, sample("still", ("Well.", 0.1), ("Well.", 0.1))])
    assert prompt_table(built(run_dir), "all").count('<tr class="differs"') == 3


def test_samples_sheet_keeps_text_and_runs_no_formula() -> None:
    texts = ["=1+1", "+1", "-1", "@a", "\ta", "\ra", 'a "b", c\nd\re', "ä = b"]
    rows = [sample("s", (text, 0.25), ("x", 0.5), "Ann: Hi.\nBob: Ho.") for text in texts]
    found = cells(samples_sheet(rows, JUDGE, TASKS["summarize"]))
    assert [row["before_response"] for row in found] == [f"'{text}" for text in texts[:6]] + texts[6:]
    assert {row["dialogue"] for row in found} == {"Ann: Hi.\nBob: Ho."}
    assert list(found[0]) == ["id", "dialogue", "summary", "before_response", "before_toxicity", "after_response",
                              "after_toxicity"]  # fmt: skip
    assert (found[0]["before_toxicity"], found[0]["after_toxicity"]) == ("0.25", "0.5")


def test_the_notebooks_table_is_sorted_by_the_gain_in_reward() -> None:
    found = cells(compared_sheet(SAMPLES))
    assert list(found[0]) == ["query", "response_before", "response_after", "reward_before", "reward_after",
                              "reward_difference"]  # fmt: skip
    assert [row["query"] for row in found] == ["Ann: You idiots! <i>Pigs!</i>", "Ann: Hello.", "Ann: Hello."]
    assert [row["reward_difference"] for row in found] == ["0.8", "0.0", "-0.7"]
    assert (found[0]["reward_before"], found[0]["reward_after"]) == ("0.1", "0.9")


def test_blind_sheet_hides_what_its_key_tells() -> None:
    rows = [sample(f"id{i}", (f"old {i}", 0.1), (f"new {i}", 0.1)) for i in range(40)]
    same = sample("same", ("x", 0.1), ("x", 0.1))
    sheet_text, key_text = blind_sheets([*rows, same], seed=3, task=TASKS["summarize"])
    sheet, key = cells(sheet_text), cells(key_text)
    assert not re.search("before|after|id[0-9]", sheet_text)
    assert list(sheet[0]) == ["number", "dialogue", "left", "right", "more_civil", "better"]
    assert list(key[0]) == ["number", "id", "left", "right"]
    policies = {"before": "old", "after": "new"}
    for row, answer in zip(sheet, key, strict=True):
        assert row["number"] == answer["number"]
        for side in ("left", "right"):
            assert row[side] == f"{policies[answer[side]]} {answer['id'].removeprefix('id')}"
        assert row["more_civil"] == row["better"] == ""
    assert sorted(row["id"] for row in key) == sorted(row["id"] for row in rows)
    assert [row["id"] for row in key] != [row["id"] for row in rows]
    assert 10 < [row["left"] for row in key].count("before") < 30


def test_blind_sheets_follow_the_seed() -> None:
    rows = [sample(f"id{i}", (f"old {i}", 0.1), (f"new {i}", 0.1)) for i in range(40)]
    assert blind_sheets(rows, seed=3, task=TASKS["summarize"]) == blind_sheets(rows, seed=3, task=TASKS["summarize"])
    assert blind_sheets(rows, seed=3, task=TASKS["summarize"]) != blind_sheets(rows, seed=4, task=TASKS["summarize"])


def test_the_page_says_how_many_prompts_can_be_rated(run_dir: Path) -> None:
    write_lines(run_dir, "samples.jsonl", [*SAMPLES, sample("still", ("Well.", 0.1), ("Well.", 0.1))])
    assert "the 3 prompts whose first response changed" in visible(built(run_dir))
    assert len(cells((run_dir / "blind_sheet.csv").read_text("utf-8"))) == 3


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("rows.json", "remove seconds.json and run again with --resume"), ("validation.jsonl", "run `detoxrl train "),
        ("eval.json", "run `detoxrl evaluate "), ("samples.jsonl", "run `detoxrl evaluate "),
    ],
)  # fmt: skip
def test_unfinished_run_names_the_stage_to_run(run_dir: Path, name: str, remedy: str) -> None:
    (run_dir / name).unlink()
    with pytest.raises(InputError, match=rf"has no {re.escape(name)}; .*{remedy}"):
        build_report(run_dir)


def test_settings_and_command_are_shown(run_dir: Path) -> None:
    text = visible(built(run_dir))
    assert "detoxrl run quickstart --seed 7 --rl.lr 0.001" in text
    assert "detoxrl run --from config.json --run-dir NEW" in text
    assert "rl.lr0.001" in text
    assert "policy.lora_targetsq, v" in text
    assert "2 min 04 s in total" in text


def test_numbers_round_without_a_negative_zero() -> None:
    assert [number(-0.0001, 2), number(-0.25, 2), number(None)] == ["0.00", "−0.25", "—"]
    assert [signed(-0.0001, 2), signed(0.004, 2), signed(0.25, 2)] == ["0.00", "0.00", "+0.25"]


def test_settings_flatten_to_dotted_keys() -> None:
    assert flatten({"a": {"b": {"c": 1}}, "d": 2}) == {"a.b.c": 1, "d": 2}


def test_perplexity_is_shown_as_exp_of_its_nats_and_its_change_as_a_ratio(run_dir: Path) -> None:
    nll = change(1.0, 1.5)  # the interval of the difference is 0.48 to 0.52
    found = EVALUATION | {"quality": {"nll": nll, "entropy": change(2.0, 1.0)}}
    measures = measured(found)
    perplexity = measures["Perplexity by the initial policy"]
    assert perplexity.cells == ("2.72", "4.48", "×1.65", "×1.62 to ×1.68")
    assert perplexity.claim == "rose from 2.72 to 4.48"
    assert perplexity.evidence == "ratio ×1.65, 95% interval ×1.62 to ×1.68"
    assert (perplexity.verdict, measures["Entropy"].verdict) == ("more", "less")  # neither is better
    assert measures["Entropy"].cells == ("2.00", "1.00", "−1.00", "−1.02 to −0.98")

    near = nll | {"difference": {"mean": 0.003, "low": 0.001, "high": 0.005, "p": 0.01, "detectable": 0.002}}
    assert measured({"toxicity": {}, "quality": {"nll": near}}).popitem()[1].interval == "×1.001 to ×1.005"
    without = {"before": 1.0, "after": 1.0, "difference": None}
    kept = measured({"toxicity": {}, "quality": {"nll": without}}).popitem()[1]
    assert (kept.cells, kept.evidence, kept.interval) == (("2.72", "2.72", "", ""), "", "")

    write(run_dir, "eval.json", found)
    shown = visible(build_report(run_dir).read_text())
    assert re.search(r"Perplexity by the initial policy.*2\.72.*4\.48.*×1\.65.*×1\.62 to ×1\.68", shown)


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        ("ahead", "At temperature 0.71 the initial policy has about the entropy of the trained policy."),
        (
            "level",
            "At temperature 0.71 the initial policy has about the entropy of the trained policy. It does as well "
            "there, so the lower toxicity may be sharpening alone.",
        ),
    ],
)
def test_the_page_says_what_the_control_for_sharpening_shows(run_dir: Path, verdict: str, expected: str) -> None:
    control = EVALUATION["baselines"]["best_of_4"]
    control = control | {"after": control["after"] | {"verdict": verdict}}
    sharpening = {"temperature": 0.7071, "left_out": None}
    write(run_dir, "eval.json", EVALUATION | {"sharpening": sharpening, "baselines": {"sharpened": control}})
    lines = visible(build_report(run_dir).read_text())
    assert expected in lines
    assert ("may be sharpening" in lines) == (verdict == "level")
    assert "Initial policy at temperature 0.71" in lines


def test_the_page_says_why_there_is_no_control_for_sharpening(run_dir: Path) -> None:
    assert "sharpening" not in visible(build_report(run_dir).read_text())  # an earlier version's run
    sharpening = {"temperature": None, "left_out": "the entropy did not fall (1.000 to 1.100 nats per token)"}
    write(run_dir, "eval.json", EVALUATION | {"sharpening": sharpening})
    expected = "There is no control for sharpening: the entropy did not fall (1.000 to 1.100 nats per token)."
    assert expected in visible(build_report(run_dir).read_text())
