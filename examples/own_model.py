"""Measure a model of your own, without training: a base against the same base with a LoRA folder on it."""

from pathlib import Path

from own_file import config

import detoxrl

# Any LoRA folder as peft saves it, with the base it belongs to; here the one that own_file.py trained.
TRAINED = Path("runs/own_file")

if __name__ == "__main__":
    mine = detoxrl.recipe(
        "own",
        {
            "policy.base": TRAINED / "base",
            "data.source": config.data.source,
            "data.dialogue_column": "talk",
            "data.summary_column": "gist",
            "reward.classifier": TRAINED / "reward",
            "rl.batch_size": 16,
        },
    )
    result = detoxrl.evaluate("runs/own_model", mine, policies={"trained": TRAINED / "adapter"}, overwrite=True)
    for judge, found in result["toxicity"].items():
        change = found["difference"]
        print(f"{judge}: {found['verdict']}, {change['mean']:+.3f} ({change['low']:+.3f} to {change['high']:+.3f})")
    print("open runs/own_model/report.html")
