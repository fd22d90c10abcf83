"""Measure a model's accuracy the way the pipeline uses it.

    python evaluate.py                           # shipped weights on the shipped sample
    python evaluate.py --images val.tar.xz --json

Images go through `iot_pipeline.classifier.Classifier`, so what is measured is the file that ships,
at its precision, without test-time augmentation.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
from collections import Counter
from pathlib import Path
from typing import Any

from images import labelled_images

from iot_pipeline.classifier import Classifier, load_classifier
from iot_pipeline.schema import CLASSES


def evaluate(classifier: Classifier, source: Path, batch_size: int = 100) -> dict[str, Any]:
    """Accuracy over all images of a source.

    Args:
        classifier: what to measure.
        source: a folder or tar archive of `<class>/<image>`.
        batch_size: images per batch.

    Returns:
        `images` (their number), `accuracy` (share that is right, 0 to 1), and per class in
        `classes` its `recall` (share of its images that are found) and `precision` (share of
        its predictions that are right; None if it was never predicted).
    """
    pairs: Counter[tuple[str, str]] = Counter()  # (truth, prediction)
    images = labelled_images(source)
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        predictions = classifier.predict([classifier.prepare(image) for image, _ in batch])
        pairs.update(
            (truth, seen.label) for (_, truth), seen in zip(batch, predictions, strict=True)
        )
    truths, seen_as = Counter[str](), Counter[str]()
    for (truth, label), count in pairs.items():
        truths[truth] += count
        seen_as[label] += count
    return {
        "images": len(images),
        "accuracy": sum(pairs[label, label] for label in CLASSES) / len(images),
        "classes": {
            label: {
                "recall": pairs[label, label] / truths[label],
                "precision": pairs[label, label] / seen_as[label] if seen_as[label] else None,
            }
            for label in CLASSES
            if truths[label]
        },
    }


def main(argv: list[str] | None = None) -> int:
    """Command line; see the module's description."""
    parser = argparse.ArgumentParser(
        description="Measure a model's accuracy the way the pipeline uses it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--model", default="shipped", help="shipped, local-dir:PATH or hf-hub:OWNER/NAME"
    )
    parser.add_argument("--revision", help="commit of a model on the hub")
    parser.add_argument(
        "--images", type=Path, help="folder or tar archive; the sample if not given"
    )
    parser.add_argument("--threads", type=int, help="CPU threads; torch's choice if not given")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)

    classifier = load_classifier(options.model, revision=options.revision, threads=options.threads)
    if options.images:
        result = evaluate(classifier, options.images)
    else:
        packed = importlib.resources.files("iot_pipeline.data") / "sample.tar.xz"
        with importlib.resources.as_file(packed) as sample:
            result = evaluate(classifier, sample)
    if options.json:
        print(json.dumps({"model": classifier.name, **result}, indent=2))
        return 0
    print(f"{classifier.name}: {result['accuracy']:.2%} of {result['images']} images")
    for label, row in result["classes"].items():
        precision = "-" if row["precision"] is None else f"{row['precision']:.1%}"
        print(f"  {label:12} recall {row['recall']:6.1%}  precision {precision:>6}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
