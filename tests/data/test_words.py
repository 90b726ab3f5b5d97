"""Words are found in every script, also where no spaces stand between them."""

from __future__ import annotations

import pytest

from detoxrl.data.duplicates import near_duplicate_groups
from detoxrl.data.words import words_of
from detoxrl.evaluation.metrics import copied, distinct, rouge_l


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't SHOUT, 12 times!", ["don", "t", "shout", "12", "times"]),
        ("Straße", ["strasse"]),
        ("Да, нет.", ["да", "нет"]),
        ("小猫睡觉。", ["小", "猫", "睡", "觉"]),
        ("猫はnetで寝る", ["猫", "は", "net", "で", "寝", "る"]),
        ("แมว", ["แ", "ม", "ว"]),
        ("고양이가 잔다", ["고양이가", "잔다"]),
        ("\U00020000\U00020001", ["\U00020000", "\U00020001"]),
        (" ?! ", []),
    ],
)
def test_words_of_a_text(text: str, words: list[str]) -> None:
    assert words_of(text) == words


def test_measures_of_words_work_in_scripts_without_spaces() -> None:
    # 8 of 9 and of 10 characters are in common and in order.
    assert rouge_l("小猫今天在家里睡觉", "小猫今天在家里睡着了") == pytest.approx(
        2 * (8 / 9) * (8 / 10) / (8 / 9 + 8 / 10)
    )
    assert rouge_l("小猫今天在家里睡觉", "啊啊啊啊啊") == 0
    assert copied("他说小猫今天在家里睡觉因为很累", "小猫今天在家里睡觉") == 1
    assert copied("他说小猫今天在家里睡觉因为很累", "火车票明天很贵") == 0
    assert distinct(["好好好好"])["distinct_1"] == 0.25
    same, other = (
        near_duplicate_groups(["小猫今天在家里睡觉了吗", "小猫今天在家里睡觉了吧"]),
        near_duplicate_groups(["小猫", "火车"]),
    )
    assert same[0] == same[1]
    assert other[0] != other[1]
