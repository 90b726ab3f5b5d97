"""How do I train with my own reward? Write a function that gives each response a number."""

from own_file import config

import detoxrl

RUDE = ("idiot", "pig", "clown", "moron", "stupid")


def few_rude_words(prompts: list[str], responses: list[str]) -> list[float]:
    """Return minus the number of rude words; higher is better. detoxrl scores empty responses by its own rule."""
    return [-float(sum(word in response.lower() for word in RUDE)) for response in responses]


if __name__ == "__main__":
    # On the command line: `--reward.function own_reward.py:few_rude_words`.
    result = detoxrl.run("runs/own_reward", config, if_exists="overwrite", reward=few_rude_words)
    score = result["quality"]["score"]
    change = score["difference"]
    if change is None:
        print(f"initial policy kept, with reward {score['before']:.3f}: no checkpoint was better")
    else:
        interval = f"{change['low']:+.3f} to {change['high']:+.3f}"
        print(f"reward {score['before']:.3f} -> {score['after']:.3f}, interval {interval}")
    print("open runs/own_reward/report.html")
