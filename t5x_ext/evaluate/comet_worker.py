"""Computes COMET scores; a script for a Python that has `unbabel-comet`, independent of the rest of this package.

arguments: model, file with `[sources, hypotheses, references]` of one system a line, file for the list of scores,
GPUs, batch size. Exit code 3: `unbabel-comet` is not installed.
"""

from __future__ import annotations

import json
import sys


def main(model_path: str, texts_path: str, scores_path: str, gpus: str, batch_size: str) -> int:
    """Scores every system of a file."""
    # The script's folder is first on the path: modules of this package would hide others of the same name.
    del sys.path[0]
    try:
        from comet import load_from_checkpoint
    except ModuleNotFoundError as error:
        if error.name != "comet":
            raise
        return 3
    model = load_from_checkpoint(model_path)
    scores = []
    with open(texts_path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            print(f"COMET: system output {number}", file=sys.stderr, flush=True)
            samples = [{"src": src, "mt": mt, "ref": ref} for src, mt, ref in zip(*json.loads(line))]
            prediction = model.predict(samples, batch_size=int(batch_size), gpus=int(gpus))
            scores.append(float(prediction.system_score))
    with open(scores_path, "w", encoding="utf-8") as file:
        json.dump(scores, file)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
