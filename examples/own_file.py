"""How do I train on my own dialogues? A CSV, JSON, JSON-lines or Parquet file, a folder of them, or a hub id."""

from pathlib import Path

import detoxrl

config = detoxrl.recipe(
    "quickstart",
    {
        "data.source": Path(__file__).with_name("dialogues.jsonl"),
        "data.text_column": "talk",
        "data.reference_column": "gist",
        # Small numbers, to be quick. If your model can summarize already: name it in policy.base, sft.steps 0.
        "sft.steps": 100,
        "sft.baseline_steps": 20,
        "rl.steps": 10,
        "rl.batch_size": 16,
        "rl.minibatch_size": 8,
        "rl.validate_every": 5,
    },
)

if __name__ == "__main__":
    result = detoxrl.run("runs/own_file", config, if_exists="overwrite")
    for judge, toxicity in result["toxicity"].items():
        before = toxicity["before"]["mean"]
        after = toxicity["after"]["mean"]
        print(f"{judge}: {toxicity['verdict']}, {before:.3f} -> {after:.3f}")
    print("open runs/own_file/report.html")
