"""Measure a trained model's activation ranges and write them into its config.json.

    python calibrate.py --data train.tar.xz --model ../models

`train.py` writes them too: this is for weights that were trained without. int8 engines need them,
and a host that runs a model has no training images.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from iot_pipeline.classifier import load_classifier
from iot_pipeline.model import CONFIG, find_model
from iot_pipeline.prepare import CALIBRATION_IMAGES, Labelled, ranges_of


def main(argv: list[str] | None = None) -> int:
    """Command line; see the module's description."""
    parser = argparse.ArgumentParser(
        description="Measure a model's activation ranges and write them into its config.json.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    models = Path(__file__).resolve().parent.parent / "models"
    parser.add_argument(
        "--data", required=True, help="training images: folder or tar of class-named folders"
    )
    parser.add_argument("--model", type=Path, default=models, help="folder of the model")
    parser.add_argument("--images", type=int, default=CALIBRATION_IMAGES, help="how many to use")
    options = parser.parse_args(argv)

    spec = f"local-dir:{options.model}"
    images = Labelled.read(options.data, load_classifier(spec), options.images)
    ranges = ranges_of(find_model(spec), images)
    file = options.model / CONFIG
    config = json.loads(file.read_text(encoding="utf-8"))
    config["activation_ranges"] = {
        layer: [round(edge, 4) for edge in pair] for layer, pair in ranges.items()
    }
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    print(f"{len(ranges)} ranges of {len(images.pixels)} images are in {file}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
