"""What does each algorithm need, and which settings does it choose?"""

from typing import Literal, NamedTuple

AlgorithmName = Literal["ppo", "rloo", "grpo", "reinforce"]


class AlgorithmTraits(NamedTuple):
    """What an algorithm needs, and the values that it gives to settings that are None."""

    has_critic: bool  # Whether a value head predicts the rest of the reward at each token.
    compares_group: bool  # Whether the baseline of a response comes from the other responses to its prompt.
    group_size: int
    std_scaling: bool
    kl_in: Literal["reward", "loss"]


ALGORITHM_TRAITS: dict[str, AlgorithmTraits] = {
    "ppo": AlgorithmTraits(has_critic=True, compares_group=False, group_size=1, std_scaling=True, kl_in="reward"),
    "rloo": AlgorithmTraits(has_critic=False, compares_group=True, group_size=4, std_scaling=False, kl_in="reward"),
    "grpo": AlgorithmTraits(has_critic=False, compares_group=True, group_size=4, std_scaling=True, kl_in="loss"),
    "reinforce": AlgorithmTraits(
        has_critic=False, compares_group=False, group_size=1, std_scaling=True, kl_in="reward"
    ),
}
