"""Plain letters for obfuscated text, and ordinary text left alone."""

from __future__ import annotations

import random
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from detoxrl.data.embedded.corpus import generate_rows, generate_utterances
from detoxrl.data.embedded.phrases import INSULTS, INTENSIFIERS, insult_pattern
from detoxrl.evaluation.attacks import DISGUISES, attack_rows, homoglyph_word, leet_word, spaced_phrase
from detoxrl.rewards.obfuscation import plain

WORDS = (*INSULTS, *INTENSIFIERS, "bonehead", "imbecile", "nincompoop", "rascal", "half", "wit")

DISGUISED = {
    "1d1ot": "idiot", "1diot": "idiot", "id!ot": "idiot", "1d!0t": "idiot", "$tupid": "stupid", "stup1d": "stupid",
    "m0r0n!!": "moron!!", "M0R0N": "MORON", "id10t": "idiot", "w3453l": "weasel", "l@zy": "lazy", "f00l": "fool",
    "half-w1t": "half-wit", "You 1d1ot, go": "You idiot, go",
    "i d i o t": "idiot", "i.d.i.o.t.": "idiot.", "i-d-i-o-t": "idiot", "s_t_u_p_i_d": "stupid", "i*d*i*o*t": "idiot",
    "S T U P I D": "STUPID", "p i g": "pig", "You are a p i g.": "You are a pig.", "an i d i o t": "an idiot",
    "A p i g": "A pig", "s t u p i d  p i g": "stupid  pig", "you a r s e": "you arse", "i d 1 o t": "i d 1 o t",
    "idiooooot": "idiot", "IDIOOOOT": "IDIOT", "stuuupiddd": "stupid", "looooser": "loser", "cowarddd": "coward",
    "fooool": "fool", "creeeeps": "creeps", "gooood": "good", "sooo": "so", "yesss": "yes", "kisss": "kiss",
    "sloooob": "slob", "nooo": "no", "hellllll": "hell", "looool": "lol",
    "\u0456d\u0456\u043et": "idiot", "You \u0430re": "You are", "you s\u03b1y": "you say",
    "ｉｄｉｏｔ": "idiot", "𝓲𝓭𝓲𝓸𝓽": "idiot", "𝗶𝗱𝗶𝗼𝘁": "idiot", "ⓘⓓⓘⓞⓣ": "idiot", "ɪᴅɪᴏᴛ": "idiot", "🅘🅓🅘🅞🅣": "IDIOT",
    "i\u200bd\u200bi\u200bo\u200bt": "idiot", "id\u00adiot": "idiot", "i\u0336d\u0336i\u0336o\u0336t\u0336": "idiot",
    "i\u0301\u0302\u0303\u0304diot": "idiot", "i d \u0456 o t": "idiot", "ｉ ｄ ｉ ｏ ｔ": "idiot",
    "１ｄ１ｏｔ": "idiot", "You \u0435\u0440\u0435": "You epe",
}  # fmt: skip

ORDINARY = [
    "room 101", "at 10:30", "3 kg", "3kg", "B2B", "COVID-19", "24/7", "$5", "US$20", "a b test", "I a m", "a.k.a.",
    "J. R. R. Tolkien", "J.R.R. Tolkien", "U.S.A.", "e.g. this", "A B C D", "x y z", "I-I-I-I don't", "w-w-what",
    "#Person1#: Hello, #Person2#.", "anna.b@example.com", "j0e@b0b.com", "@m00se", "#m00d", "www.f00l.com",
    "https://t.co/R5wuXA9jB6", "Great!Thanks", "hello!there", "wow!!!how", "H1N1", "R2D2", "mp3", "4x4", "1h30m", "W3C",
    "user1name1", "10am", "1st 2nd 3rd 4th", "1980s", "4ever", "3months", "c++", "C-3PO", "III", "XVIII", "www", "mmm",
    "Hmm", "oo", "id**t", "st*pid", "idoit", "id.iot", "iDiOt", "o'clock", "don 't a b", "O_o O_o", "T_T", "x x x x",
    "Привет, как дела? а он у нас", "Мой iPhone у оса", "Ну, SMSки", "СССР", "Καλημέρα, ο άνθρωπος", "Σε 5 λεπτά",
    "你好，２０２０年", "Tシャツ", "می\u200cخواهم", "Grüße aus Düsseldorf, Straße", "Où est l'été, ça va ?",
    "Đây là tiếng Việt", "kadın ığdır", "Łódź", "5 µm, TNF-α, γ-ray", "½ … ™ m² H₂O", "👨\u200d👩\u200d👧 ❤\ufe0f",
    "e\u0301te\u0301", "№ 5", "ℹ", "x = \u0430",
]  # fmt: skip


@pytest.mark.parametrize("text", DISGUISED)
def test_disguised_words_are_read(text: str) -> None:
    assert plain(text) == DISGUISED[text]


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_stays(text: str) -> None:
    assert plain(text) == text


def test_a_line_with_words_of_another_script_is_no_disguise() -> None:
    latin = "we saw the \u0441\u043e\u0440\u0435 there"
    assert plain(latin) == "we saw the cope there"
    assert plain(f"{latin} привет") == f"{latin} привет"
    assert plain(f"{latin}\nпривет") == "we saw the cope there\nпривет"


PIECES = st.sampled_from([*DISGUISED, *ORDINARY, " ", ".", "-", "a", "I", "0", "!", "$", "\n", "\u200b", "\u0336"])


@given(st.one_of(st.text(), st.lists(PIECES).map("".join), st.text("aieoxABI013@$!.- _\u0430\u0456\u200b\u0336ｉ")))
def test_reading_twice_changes_nothing_more(text: str) -> None:
    read = plain(text)
    assert plain(read) == read


@given(st.lists(st.text(string.ascii_letters, min_size=2)).map(" ".join))
def test_words_of_plain_letters_stay(text: str) -> None:
    if re.search(r"([a-z])\1\1", text, re.IGNORECASE) is None:
        assert plain(text) == text


@given(st.sampled_from(WORDS), st.integers(0, 10_000))
def test_each_disguise_of_a_word_is_undone(word: str, seed: int) -> None:
    rng = random.Random(seed)
    for disguised in (leet_word(word, rng), homoglyph_word(word, rng)):
        assert plain(f"You are a {disguised}.") == f"You are a {word}."
    two = spaced_phrase([word, "idiot"], rng)
    assert plain(f"You are such a {two}!").split() == ["You", "are", "such", "a", word, "idiot!"]


@pytest.mark.parametrize("attack", DISGUISES)
def test_a_list_finds_no_insult_in_an_attack_and_one_in_its_plain_form(attack: str) -> None:
    insult = insult_pattern()
    for task in ("summarize", "chat"):
        rows = attack_rows(3, 100, task, [attack])
        assert len(rows) == 100
        for row in rows:
            assert not insult.search(row.response)
            assert insult.search(plain(row.response))


def test_generated_texts_stay() -> None:
    texts = [text for text, _ in generate_utterances(0, 2000)]
    for row in generate_rows(0, {"train": 500})["train"]:
        texts += [row.text, *row.references, *row.civil_references]
    assert [text for text in texts if plain(text) != text] == []
