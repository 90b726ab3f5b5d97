"""How do I evaluate my own model without training? Compare a base with the same base plus a LoRA folder."""

from pathlib import Path

from own_file import config

import detoxrl

# Any LoRA folder in peft's format, and the base it belongs to. Here: the one that own_file.py trained.
TRAINED = Path("runs/own_file")

if __name__ == "__main__":
    own_config = detoxrl.recipe(
        "own",
        {
            "policy.base": TRAINED / "base",
            "data.source": config.data.source,
            "data.text_column": "talk",
            "data.reference_column": "gist",
            "reward.classifier": TRAINED / "reward",
            "rl.batch_size": 16,
        },
    )
    result = detoxrl.evaluate("runs/own_model", own_config, policies={"trained": TRAINED / "adapter"}, overwrite=True)
    for judge, toxicity in result["toxicity"].items():
        change = toxicity["difference"]
        print(f"{judge}: {toxicity['verdict']}, {change['mean']:+.3f} ({change['low']:+.3f} to {change['high']:+.3f})")
    print("open runs/own_model/report.html")
