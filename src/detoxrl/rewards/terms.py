"""How is a response scored by several terms?"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from detoxrl.config.terms import TERM_KINDS, Term
from detoxrl.data.embedded.phrases import SEEN_INSULTS, insult_pattern
from detoxrl.models.sentences import Encode
from detoxrl.models.types import Prompt
from detoxrl.rewards.lexicon import lexicon_rate
from detoxrl.rewards.obfuscation import plain
from detoxrl.rewards.overlap import copied, repeated, sameness, similarity

Score = Callable[[Sequence[Prompt], Sequence[str]], torch.Tensor]
"""(prompts, responses) -> values (B,)."""


class ScoredTerm(NamedTuple):
    """A term with the function that computes its values."""

    term: Term
    score: Score


class Reward(NamedTuple):
    """The terms of a reward. Called with B prompts and their responses, it returns raw values (B, terms).

    Most terms read each response by itself, and their values may be computed in parts or kept. Others compare the
    responses to different prompts, so they need all of a batch at once.
    """

    scored: tuple[ScoredTerm, ...]

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> torch.Tensor:
        return self.with_shared(self.alone(prompts, responses), prompts, responses)

    def alone(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> torch.Tensor:
        """Return the values (B, terms) of the terms that read each response by itself, and 0 for the others."""
        columns = [
            torch.zeros(len(responses)) if _is_shared(scored) else scored.score(prompts, responses).float()
            for scored in self.scored
        ]
        return torch.stack(columns, 1)

    def with_shared(self, alone: torch.Tensor, prompts: Sequence[Prompt], responses: Sequence[str]) -> torch.Tensor:
        """Return values (B, terms) of `alone` with those of the terms that compare all B responses."""
        columns = [
            scored.score(prompts, responses).to(values) if _is_shared(scored) else values
            for scored, values in zip(self.scored, alone.unbind(1), strict=True)
        ]
        return torch.stack(columns, 1)

    @property
    def terms(self) -> tuple[Term, ...]:
        """The terms, one for each column of the values."""
        return tuple(scored.term for scored in self.scored)

    @property
    def reads_initial_responses(self) -> bool:
        """Whether prompts must come with a response of the initial policy."""
        return any(term.kind == "similarity" for term in self.terms)


def _is_shared(scored: ScoredTerm) -> bool:
    return TERM_KINDS[scored.term.kind].is_shared


def single_term(score: Score) -> Reward:
    """Return a reward whose one term is a function of prompts and responses."""
    return Reward((ScoredTerm(Term(kind="function", name="function"), score),))


def text_score(term: Term, encode: Encode | None) -> Score:
    """Return how a term is computed that needs no classifier and no function; `encode` serves similarities."""
    if term.kind == "similarity":
        return _of_texts(_initial_response, encode)
    if term.kind == "source_similarity":
        return _of_texts(_row_text, encode)
    if term.kind == "sameness":
        return _sameness

    measures: dict[str, Callable[[Prompt, str], float]] = {
        "length": lambda _, response: outside(len(response.split()), term.minimum, term.maximum),
        "repetition": lambda _, response: repeated(response),
        "copy": lambda prompt, response: copied(_row_text(prompt), response),
    }
    measure = measures[term.kind]

    def score(prompts: Sequence[Prompt], responses: Sequence[str]) -> torch.Tensor:
        values = [measure(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        return torch.tensor(values, dtype=torch.float32)

    return score


def worse_of_plain(score: Score) -> Score:
    """Return a score that also reads each response in plain letters, where that is another text; the worse one counts.

    So "1d1ot" scores no better than the word that it stands for.
    """

    def worse(prompts: Sequence[Prompt], responses: Sequence[str]) -> torch.Tensor:
        values = score(prompts, responses)
        disguised = [row for row, response in enumerate(responses) if plain(response) != response]
        if not disguised:
            return values

        read = score([prompts[row] for row in disguised], [plain(responses[row]) for row in disguised])
        values = values.clone()
        values[disguised] = torch.minimum(values[disguised], read)
        return values

    return worse


def lexicon_score(pattern: re.Pattern[str] | None) -> Score:
    """Return the share of a response's words that a pattern finds; None: insults that the embedded classifier knows."""
    words = insult_pattern(SEEN_INSULTS) if pattern is None else pattern
    return lambda _, responses: lexicon_rate(responses, words)


def _sameness(prompts: Sequence[Prompt], responses: Sequence[str]) -> torch.Tensor:
    return torch.tensor(sameness([prompt.text for prompt in prompts], responses), dtype=torch.float32)


def _of_texts(other: Callable[[Prompt], str], encode: Encode | None) -> Score:
    def score(prompts: Sequence[Prompt], responses: Sequence[str]) -> torch.Tensor:
        others = [other(prompt) for prompt in prompts]
        return torch.from_numpy(similarity(encode, responses, others).astype(np.float32))

    return score


def _initial_response(prompt: Prompt) -> str:
    assert prompt.initial_response is not None, "a prompt comes with a response of the initial policy"
    return prompt.initial_response


def _row_text(prompt: Prompt) -> str:
    return prompt.row_text


def outside(words: int, minimum: int, maximum: int | None) -> float:
    """Return by which share of a bound a number of words misses it: 0 between the bounds, 1 at twice the maximum."""
    if words < minimum:
        return (minimum - words) / minimum
    if maximum is not None and words > maximum:
        return (words - maximum) / max(maximum, 1)
    return 0.0
