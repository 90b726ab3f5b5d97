"""Train on dialogues of your own: any CSV, JSON, JSON-lines or Parquet file, a folder of such, or a hub id."""

from pathlib import Path

import detoxrl

config = detoxrl.recipe(
    "quickstart",
    {
        "data.source": Path(__file__).with_name("dialogues.jsonl"),
        "data.dialogue_column": "talk",
        "data.summary_column": "gist",
        # Small, to be quick. With a model that can summarize already, name it in policy.base and set sft.steps to 0.
        "sft.steps": 100,
        "sft.baseline_steps": 20,
        "rl.steps": 10,
        "rl.batch_size": 16,
        "rl.minibatch_size": 8,
        "rl.validate_every": 5,
    },
)

if __name__ == "__main__":
    result = detoxrl.run("runs/own_file", config, overwrite=True)
    for judge, found in result["toxicity"].items():
        print(f"{judge}: {found['verdict']}, {found['before']['mean']:.3f} -> {found['after']['mean']:.3f}")
    print("open runs/own_file/report.html")
