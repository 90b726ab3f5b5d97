"""What does an obfuscated text say in plain letters?

Whoever wants an insult to pass a classifier or a word list writes it so that people can still read it: "1d1ot",
"i d i o t", "idiooot", or with letters of other scripts that look Latin. Hosseini et al. 2017 ("Deceiving Google's
Perspective API") and Li et al. 2019 (TextBugger, NDSS) show that this works, and a policy can learn it from a reward.
Look-alike letters follow the idea of the skeletons of Unicode TS 39. A skeleton is meant for comparing identifiers: it
turns whole texts of other scripts into Latin. Here the neighbouring letters decide, so only disguised words change.

These are rules, not a model. They read neither masked letters ("id**t"), misspellings ("idoit"), one separator within a
word ("id.iot"), accents ("ídíot", because accents belong to languages), nor a 1 that stands for an l.
"""

import re
import string
import unicodedata
from functools import lru_cache

# Letters of other scripts that cannot be told from Latin ones in usual fonts: a word made of them alone may be Latin.
_IDENTICAL = str.maketrans(
    {
        # Cyrillic
        "а": "a", "с": "c", "ԁ": "d", "е": "e", "һ": "h", "і": "i", "ј": "j", "ӏ": "l", "о": "o", "р": "p", "ԛ": "q",
        "ѕ": "s", "ѵ": "v", "ԝ": "w", "х": "x", "у": "y", "А": "A", "В": "B", "С": "C", "Е": "E", "Н": "H", "І": "I",
        "Ј": "J", "К": "K", "М": "M", "О": "O", "Р": "P", "Ѕ": "S", "Т": "T", "Х": "X", "У": "Y",
        # Greek
        "ο": "o", "Α": "A", "Β": "B", "Ε": "E", "Ζ": "Z", "Η": "H", "Ι": "I", "Κ": "K", "Μ": "M", "Ν": "N", "Ο": "O",
        "Ρ": "P", "Τ": "T", "Υ": "Y", "Χ": "X",
    }
)  # fmt: skip
# Letters that pass for Latin ones among Latin letters, and nowhere else.
_SIMILAR = str.maketrans(
    {
        # Cyrillic
        "в": "b", "г": "r", "к": "k", "м": "m", "н": "h", "п": "n", "т": "t", "ь": "b",
        # Greek
        "α": "a", "β": "b", "ϲ": "c", "ε": "e", "η": "n", "ι": "i", "κ": "k", "ν": "v", "ρ": "p", "τ": "t", "υ": "u",
        "χ": "x", "ω": "w",
        # Armenian
        "ց": "g", "հ": "h", "ո": "n", "օ": "o", "զ": "q", "ս": "u",
        # Cherokee
        "Ꭺ": "A", "Ᏼ": "B", "Ꮯ": "C", "Ꭰ": "D", "Ꭼ": "E", "Ꮐ": "G", "Ꮋ": "H", "Ꭻ": "J", "Ꮶ": "K", "Ꮮ": "L", "Ꮇ": "M",
        "Ꮲ": "P", "Ꭱ": "R", "Ꮪ": "S", "Ꭲ": "T", "Ꮩ": "V", "Ꮃ": "W", "Ꮓ": "Z",
    }
)  # fmt: skip
# Latin letters of phonetic alphabets. No language has them in its usual spelling, as Turkish has ı.
_PHONETIC = dict(zip("ᴀʙᴄᴅᴇꜰɢʜɪᴊᴋʟᴍɴᴏᴘʀꜱᴛᴜᴠᴡʏᴢɑɡ", "abcdefghijklmnoprstuvwyzag", strict=True))
# Blocks with styled letters and digits: letter-like symbols, circled, full-width, mathematical, enclosed.
_STYLED_BLOCKS = ((0x2100, 0x214F), (0x24B6, 0x24E9), (0xFF10, 0xFF5A), (0x1D400, 0x1D7FF), (0x1F130, 0x1F189))
_INFORMATION = 0x2139  # A letter i that is used as a sign.
_STYLES = ("<font>", "<circle>", "<wide>", "<square>")


def _styled() -> dict[str, str]:
    """Return the ASCII letter or digit of each styled one: full-width, mathematical, circled or in a square."""
    ascii_of = dict(_PHONETIC)
    for first, last in _STYLED_BLOCKS:
        for code in set(range(first, last + 1)) - {_INFORMATION}:
            style, *parts = unicodedata.decomposition(chr(code)).split() or [""]
            letter = unicodedata.normalize("NFKC", chr(code))
            if style in _STYLES and len(parts) == 1 and letter.isascii() and letter.isalnum():
                ascii_of[chr(code)] = letter

    # White letters on black have no decomposition.
    for first in (0x1F150, 0x1F170):
        ascii_of.update({chr(first + i): letter for i, letter in enumerate(string.ascii_uppercase)})
    return ascii_of


_STYLED = str.maketrans(_styled())
_TO_LATIN = {**_STYLED, **_IDENTICAL, **_SIMILAR}
_LETTERS = "A-Za-z" + "".join(map(chr, _TO_LATIN))

_INVISIBLE = "\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufe00-\ufe0f\ufeff"
_MARKS = "\u0300-\u036f\u0489\u20d0-\u20f0"
# Invisible characters; lines through, over and under a letter; three marks or more on one letter, as in no language.
_HIDING = re.compile(rf"[{_INVISIBLE}\u0305\u0332-\u0338\u033f\u0489\u20d0-\u20f0]|(?<![{_MARKS}])[{_MARKS}]{{3,}}")
_LETTER = rf"(?:[^\W\d_]|[{''.join(map(chr, _STYLED))}])"
_WORD = re.compile(rf"{_LETTER}(?:{_LETTER}|[{_MARKS}{_INVISIBLE}])*")

_ADDRESS = r"https?://\S+|www\.\S+|(?<!\S)\S+@\w+\.\w\S*"

# Single letters with the same separator between them.
_SPELLED = re.compile(
    rf"(?<![\w'’])(?P<letters>[{_LETTERS}](?P<separator>[ .\-_*·•~])[{_LETTERS}](?:(?P=separator)[{_LETTERS}])+)(?!\w)"
)
_SYLLABLE = re.compile(r"[^aeiou][aeiou][^aeiou]", re.IGNORECASE)
# Behind one of these, "a" is the first letter of a spelled word, not an article.
_NO_ARTICLE_BEHIND = re.compile(r"\b(?:an|the|you|your|my|his|her|their|this|that|so|very)\s$", re.IGNORECASE)

_LEET = str.maketrans("013457@$!", "oieastasi")
_LEET_WORD = re.compile(rf"{_ADDRESS}|(?<![\w@#$!/])(?<!\w\.)(?P<word>[A-Za-z015$][A-Za-z013457@$!]+)(?!\w)")
_SIGN_BETWEEN_LETTERS = re.compile(r"[A-Za-z](?:[013457@$]|!(?!!)){1,4}[A-Za-z]")
# The end of a sentence, without the blank: "Great!Thanks".
_SENTENCE_END = re.compile(r"[A-Za-z]{3,}![A-Za-z]{3,}|\w+[a-z]![A-Z]\w*")
_SIGN_FIRST = re.compile(r"\$[a-z]{3,}|[015][a-z]{4,}")
_MEASURE = re.compile(r"(?:\d+(?:h|hrs?|m|mins?|s|secs?|d|ft|in|mm|cm|k|km|kg|x|am|pm))+\d*")

_STRETCHED = re.compile(rf"{_ADDRESS}|(?<![\w@#])(?P<word>[^\W\d_]*([a-z])\2\2[^\W\d_]*)(?![^\W\d_])", re.IGNORECASE)
_RUN = re.compile(r"([a-z])\1\1+", re.IGNORECASE)
# Short words whose usual spelling has the letter twice, and the letters in question.
_DOUBLED = {
    "oe": re.compile(r"(?!lool)[^aeiou]+(?:oo[dfklmnr]|ee[dklnprt])s?", re.IGNORECASE),
    "fls": re.compile(r"[^aeiou]*(?:[aio]ss|[aeiou]ll|[aiou]ff)", re.IGNORECASE),
}
_ROMAN = re.compile(r"m*(?:c[md]|d?c{0,3})(?:x[cl]|l?x{0,3})(?:i[xv]|v?i{0,3})", re.IGNORECASE)


def plain(text: str) -> str:
    """Return a text with its disguised words in plain letters; ordinary text stays as it is.

    - Look-alike letters become Latin in words that also have Latin letters. A word of look-alikes alone becomes Latin
      if it has two letters or more, and its line has Latin words and none that is clearly of another script.
    - Styled letters (full-width, mathematical, circled, small capitals) become plain. Invisible characters, and lines
      through letters, disappear from Latin words.
    - Four single letters or more with equal separators become a word, and three if they are a consonant, a vowel and a
      consonant: "p.i.g", not "a.k.a.". A first "a" stays an article: "a p i g" is "a pig".
    - Signs between letters become letters: "1d!0t", "m0r0n". A word that ends in a digit is a code: "H1N1".
    - A letter that is repeated three times or more stands once, or twice where short words usually have it twice.

    Case stays. The result is a fixed point: `plain(plain(text)) == plain(text)`.
    """
    before = None
    while text != before:  # Each step has fewer foreign letters, fewer signs or fewer characters than the one before.
        before = text
        text = _with_latin_letters(text)
        text = _SPELLED.sub(_joined, text)
        text = _LEET_WORD.sub(_without_signs, text)
        text = _STRETCHED.sub(_shortened, text)
    return text


def _with_latin_letters(text: str) -> str:
    """Return a text whose disguised Latin words have Latin letters."""
    if text.isascii():
        return text
    return "\n".join(_line_with_latin_letters(line) for line in text.split("\n"))


def _line_with_latin_letters(line: str) -> str:
    words = _WORD.findall(line)
    has_latin = any(map(_has_latin, words))
    has_foreign = any(_is_foreign(word) for word in words)
    reads_latin = has_latin and not has_foreign
    return _WORD.sub(lambda match: _latin_word(match[0], reads_latin), line)


def _latin_word(word: str, line_reads_latin: bool) -> str:
    """Return a word in plain Latin letters, or unchanged if it is not a disguised Latin word."""
    bare = _HIDING.sub("", word)
    letters = [character for character in bare if not unicodedata.combining(character)]

    if _has_latin(word):
        is_disguised = all(_is_latin(letter) or ord(letter) in _TO_LATIN for letter in letters)
    else:
        is_disguised = line_reads_latin and len(letters) > 1 and all(ord(letter) in _IDENTICAL for letter in letters)
    return bare.translate(_TO_LATIN) if is_disguised else word


def _has_latin(word: str) -> bool:
    return any(map(_is_latin, word))


def _is_foreign(word: str) -> bool:
    """Return whether a word is clearly of another script: it has a letter that does not look Latin there."""
    look_alikes = _TO_LATIN if _has_latin(word) else _IDENTICAL
    return any(letter.isalpha() and not _is_latin(letter) and ord(letter) not in look_alikes for letter in word)


@lru_cache(maxsize=4096)
def _is_latin(character: str) -> bool:
    """Return whether a character is a Latin letter, plain, styled or with an accent."""
    if ord(character) in _STYLED:
        return not character.isdigit()
    return character.isalpha() and unicodedata.name(character, "").startswith("LATIN")


def _joined(match: re.Match[str]) -> str:
    """Return spelled-out letters as a word, or unchanged if they may be initials, options or single words."""
    spelled, separator = match["letters"], match["separator"]
    letters = spelled[::2]

    first, rest = letters[0], letters[1:]
    may_be_article = separator == " " and first in "aA" and not rest.isupper()
    if may_be_article and _is_spelled_word(rest) and not _NO_ARTICLE_BEHIND.search(match.string[: match.start()]):
        return f"{first} {rest}"
    return letters if _is_spelled_word(letters) else spelled


def _is_spelled_word(letters: str) -> bool:
    """Return whether single letters in a row are a word and neither initials, options ("A B C D") nor a stutter."""
    latin = letters.translate(_TO_LATIN).lower()
    is_repeated = len(set(latin)) == 1
    is_alphabet = latin in string.ascii_lowercase
    if is_repeated or is_alphabet or not _has_latin(letters):
        return False
    return len(latin) > 3 or _SYLLABLE.fullmatch(latin) is not None


def _without_signs(match: re.Match[str]) -> str:
    """Return a word with letters for signs, or unchanged if they stand for themselves. Addresses stay as they are."""
    if match["word"] is None:
        return match[0]
    word = match["word"].rstrip("!@$")
    ending = match["word"][len(word) :]

    written = sum(map(str.isalpha, word))
    is_code = word[-1:].isdigit() or written < 2 or (written == 2 and not word.islower())
    if is_code or _SENTENCE_END.fullmatch(word) or _MEASURE.fullmatch(word):
        return match[0]

    if not _SIGN_BETWEEN_LETTERS.search(word) and not _SIGN_FIRST.fullmatch(word):
        return match[0]
    letters = word.translate(_LEET)
    return (letters.upper() if word.isupper() else letters) + ending


def _shortened(match: re.Match[str]) -> str:
    """Return a stretched word in its usual length. Addresses, numerals and words of one letter stay as they are."""
    word = match["word"]
    if word is None or len(set(word.lower())) == 1 or _ROMAN.fullmatch(word):
        return match[0]

    for letters, usual in _DOUBLED.items():
        doubled = _RUN.sub(lambda run, letters=letters: run[1] * (1 + (run[1].lower() in letters)), word)
        if usual.fullmatch(doubled):
            return doubled
    return _RUN.sub(r"\1", word)
