"""What most projects of this kind run: one message at a time, a batch of one, automatic commits.

It is written as a competent beginner writes it after the libraries' own examples, for comparison
with `iot-pipeline infer` and `store`. The model, its weights, PyTorch and the threads are the
service's. What it is not: it is not slowed down on purpose. There is no flush after each message,
the model is loaded once and in eval mode, gradients are off, the database connection is kept.

Runs in the place of a service, with its environment:

    python baseline.py infer|store SECONDS

It stops after so many seconds, counted from the first message, or once no message has come for ten
(for the first one it waits a minute), and prints how many messages it handled in how many seconds,
as JSON.
"""

import base64
import importlib.resources
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kafka import KafkaConsumer, KafkaProducer

SERVERS = os.environ["IOT_BOOTSTRAP_SERVERS"].split(",")
IMAGES = os.environ["IOT_IMAGE_TOPIC"]
PREDICTIONS = os.environ["IOT_PREDICTION_TOPIC"]


def connection() -> dict[str, Any]:
    """Where the brokers are and, where they ask, who we are."""
    options: dict[str, Any] = {
        "bootstrap_servers": SERVERS,
        "security_protocol": os.environ.get("IOT_SECURITY_PROTOCOL", "PLAINTEXT"),
        "ssl_cafile": os.environ.get("IOT_TLS_CA_FILE") or None,
        "ssl_certfile": os.environ.get("IOT_TLS_CERTIFICATE_FILE") or None,
        "ssl_keyfile": os.environ.get("IOT_TLS_KEY_FILE") or None,
    }
    if options["security_protocol"] == "SASL_SSL":
        options["sasl_mechanism"] = os.environ["IOT_SASL_MECHANISM"]
        options["sasl_plain_username"] = os.environ["IOT_SASL_USERNAME"]
        password_file = Path(os.environ["IOT_SASL_PASSWORD_FILE"])
        options["sasl_plain_password"] = password_file.read_text().strip()
    return options


def messages(*topics: str) -> Iterator[Any]:
    consumer = KafkaConsumer(
        *topics,
        **connection(),
        group_id=os.environ["IOT_GROUP_ID"],
        auto_offset_reset="earliest",
        value_deserializer=json.loads,
        consumer_timeout_ms=10_000,
    )
    began = False
    # On a busy machine it takes a while until the group has met.
    for _ in range(6):
        for message in consumer:
            began = True
            yield message
        if began:
            break
    consumer.close()


def load_model() -> tuple[Any, list[str], Any]:
    """The network, the names of its outputs, and the preparation of an image."""
    import safetensors.torch
    import timm
    import torch
    from torchvision import transforms

    torch.set_num_threads(int(os.environ["IOT_THREADS"]))
    folder = importlib.resources.files("iot_pipeline.models")
    config = json.loads((folder / "config.json").read_text())
    network = timm.create_model(
        config["architecture"], num_classes=config["num_classes"], channels=config["channels"]
    )
    network.conv1 = torch.nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    network.maxpool = torch.nn.Identity()
    weights = safetensors.torch.load((folder / "resnet18-cifar10.safetensors").read_bytes())
    network.load_state_dict(weights)
    network.eval()
    prepare = transforms.Compose(
        [
            transforms.Resize(config["input_size"][1:]),
            transforms.ToTensor(),
            transforms.Normalize(config["mean"], config["std"]),
        ]
    )
    return network, config["class_names"], prepare


def infer() -> Iterator[None]:
    import torch
    from PIL import Image

    network, labels, prepare = load_model()
    producer = KafkaProducer(
        **connection(), value_serializer=lambda value: json.dumps(value).encode()
    )
    for message in messages(IMAGES):
        image = Image.open(io.BytesIO(base64.b64decode(message.value["Data"]))).convert("RGB")
        with torch.no_grad():
            probabilities = network(prepare(image).unsqueeze(0)).softmax(1)[0]
        best = int(probabilities.argmax())
        prediction = {
            "ID": message.value["ID"],
            "InferredValue": labels[best],
            "Confidence": float(probabilities[best]),
            "Model": "resnet18",
            "InferredAt": datetime.now(UTC).isoformat(),
        }
        producer.send(PREDICTIONS, key=message.key, value=prediction)
        yield
    producer.close()


def store() -> Iterator[None]:
    import couchdb

    if os.environ.get("IOT_STORE_CA_FILE"):
        os.environ["SSL_CERT_FILE"] = os.environ["IOT_STORE_CA_FILE"]
    url = urlsplit(os.environ["IOT_STORE_URL"])
    server = couchdb.Server(f"{'https' if 'tls=true' in url.query else 'http'}://{url.netloc}")
    server.resource.credentials = (
        os.environ["IOT_STORE_USER"],
        Path(os.environ["IOT_STORE_PASSWORD_FILE"]).read_text().strip(),
    )
    name = url.path.strip("/")
    database = couchdb.Database(server.resource(name), name)
    for message in messages(IMAGES, PREDICTIONS):
        document = database.get(message.value["ID"]) or {"_id": message.value["ID"]}
        document.update(message.value)
        database.save(document)
        yield


def count(stage: Callable[[], Iterator[None]], seconds: float) -> dict[str, float]:
    handled, began, ended = 0, 0.0, 0.0
    for _ in stage():
        ended = time.monotonic()
        if not began:
            began = ended
            continue
        handled += 1
        if ended - began > seconds:
            break
    return {"messages": handled, "seconds": ended - began}


def main() -> None:
    stages = {"infer": infer, "store": store}
    print(json.dumps(count(stages[sys.argv[1]], float(sys.argv[2]))))


if __name__ == "__main__":
    main()
