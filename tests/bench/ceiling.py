"""The engine alone: images per second of the installed classifier, without Kafka or decoding.

Runs in the place of a service, so with its environment, threads and settings:

    python ceiling.py SECONDS BATCH...

Prints a JSON object with the classifier's name and, by batch size, images per second and CPU
milliseconds an image.
"""

import io
import itertools
import json
import sys
import time

from PIL import Image

from iot_pipeline.classifier import classifier_of
from iot_pipeline.settings import InferSettings, load
from iot_pipeline.sources import open_source

WARM_UP = 0.5  # seconds


def main() -> None:
    seconds, batches = float(sys.argv[1]), [int(word) for word in sys.argv[2:]]
    settings = load(InferSettings)
    classifier = classifier_of(settings)
    classifier.warm_up()
    with open_source("sample") as source:
        pixels = [classifier.prepare(decode(image.data)) for image in source]
    endless = itertools.cycle(pixels)
    rates, costs = {}, {}
    for size in batches:
        for limit in (WARM_UP, seconds):
            images, began, used = 0, time.monotonic(), time.process_time()
            while time.monotonic() - began < limit:
                classifier.predict(list(itertools.islice(endless, size)))
                images += size
            rates[str(size)] = images / (time.monotonic() - began)
            costs[str(size)] = (time.process_time() - used) / images * 1000
    found = {"model": classifier.name, "images_per_second": rates, "cpu_ms_per_image": costs}
    print(json.dumps(found))


def decode(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


if __name__ == "__main__":
    main()
