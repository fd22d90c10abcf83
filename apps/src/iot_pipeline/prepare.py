"""`iot-pipeline prepare-model`: compile the model for its engine, once, and hold it to torch.

The last line begins with `made` or `found`, so that whoever calls it can tell what happened.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path

from iot_pipeline.classifier import (
    PREPARED,
    Classifier,
    is_prepared,
    load_classifier,
    prepared_folder,
    read_record,
)
from iot_pipeline.engines import PrecisionError, find_engine, ladder
from iot_pipeline.errors import ConfigError, Exit, InvalidMessage, PipelineError
from iot_pipeline.model import Model, Ranges, find_model
from iot_pipeline.pictures import open_image
from iot_pipeline.processor import instructions
from iot_pipeline.settings import PrepareModelSettings
from iot_pipeline.sources import open_source

ALLOWED_LOSS = 0.005
"""How much smaller than torch's in single precision an engine's share of right answers may be."""

CALIBRATION_IMAGES = 1000  # more of them hardly move the ranges
_BATCH = 50

# What a library's code ends a process with where the processor, or the library itself, is not what
# it takes it for.
_FATAL = (signal.SIGILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGABRT)


class ParityError(PrecisionError):
    """The compiled model is less accurate than torch in single precision. It is not used."""

    exit_status = Exit.FAILED


@dataclass(frozen=True)
class Labelled:
    """Images that a classifier can take, with what they show."""

    pixels: Sequence[bytes]
    labels: Sequence[str]

    @classmethod
    def read(cls, spec: str, classifier: Classifier, limit: int | None = None) -> Labelled:
        """Read a folder or tar of class-named folders, or the sample that ships.

        Args:
            spec: see `sources.open_source`.
            classifier: prepares the images.
            limit: the most images to read, of all classes in turn.

        Raises:
            ConfigError: it cannot be read, or shows nothing that the model knows.
        """
        with open_source(spec) as source:
            images = list(islice(source, limit))
        try:
            pixels = [classifier.prepare(open_image(image.data, 2**26)) for image in images]
        except InvalidMessage as error:
            raise ConfigError(f"{spec} holds an image that cannot be read: {error}") from error
        labels = [image.label for image in images]
        if not set(labels) & set(classifier.labels):
            raise ConfigError(
                f"{spec} shows {', '.join(sorted(set(labels))[:5])} and the model knows "
                f"{', '.join(classifier.labels[:5])}: name images of its own classes with "
                "IOT_VALIDATION_IMAGES (the role's variable: inference_node_validation_images)"
            )
        return cls(pixels, labels)

    def accuracy(self, classifier: Classifier) -> float:
        """Share of the images that the classifier gets right, 0 to 1."""
        right = 0
        for start in range(0, len(self.pixels), _BATCH):
            part = slice(start, start + _BATCH)
            seen = classifier.predict(self.pixels[part])
            right += sum(p.label == truth for p, truth in zip(seen, self.labels[part], strict=True))
        return right / len(self.pixels)


def check_parity(reference: float, accuracy: float, what: str) -> None:
    """Refuse an engine that gets fewer images right.

    Args:
        reference: share that torch in single precision gets right, 0 to 1.
        accuracy: the engine's.
        what: names the engine in the message.

    Raises:
        ParityError: the accuracy is more than `ALLOWED_LOSS` below the reference.
    """
    if reference - accuracy > ALLOWED_LOSS + 1e-9:
        raise ParityError(
            f"{what} gets {accuracy:.2%} of the images right and torch in single precision "
            f"{reference:.2%}: more than {ALLOWED_LOSS:.1%} less, which is refused"
        )


def run(settings: PrepareModelSettings) -> int:
    """Prepare the model, unless it is there.

    Raises:
        ConfigError: the settings ask for what there is not, or for what this host lacks.
        ParityError: what was compiled is less accurate than it may be. Not with `auto`, which steps
            down to the next precision, and takes the last as it is.
    """
    model = find_model(settings.model, settings.model_revision or None)
    automatic = settings.precision == "auto"
    rungs = ladder(
        settings.engine,
        settings.precision,
        model,
        calibrated=bool(settings.calibration_images),
    )
    if automatic and model.config.ranges is None:
        say(f"{model.name} comes without activation_ranges, so auto is fp32")
    steps: list[str] = []
    for rung in rungs:
        is_last = rung == rungs[-1]
        try:
            say(_apart(settings, Attempt(rung, steps, strict=not (automatic and is_last))))
            break
        except PrecisionError as error:
            if is_last:
                raise
            steps.append(f"{rung}: {error.reason}")
            say(f"auto is not {steps[-1]}")
    return Exit.OK


@dataclass(frozen=True)
class Attempt:
    """A precision to prepare the model in."""

    precision: str
    steps: Sequence[str] = ()
    """The precisions that `auto` tried before, each with the reason why it is not used."""
    strict: bool = True
    """Whether it is refused when it is less accurate than it may be."""


def _apart(settings: PrepareModelSettings, attempt: Attempt) -> str:
    """Do `prepare` in a process of its own, which an instruction that is missing may end.

    Raises:
        PrecisionError: it did.
        PipelineError: what `prepare` raises, or the process was ended by something else.
    """
    # Not a copy of this process: the libraries' threads would be missing in it.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(theirs, settings, attempt))
    child.start()
    theirs.close()
    answer: str | PipelineError | None = None
    try:
        answer = ours.recv()
    except EOFError:
        pass
    except BaseException:
        child.kill()
        raise
    finally:
        child.join()
        for left in Path(settings.model_cache).glob(f"{_partial_name(child.pid)}*"):
            shutil.rmtree(left, ignore_errors=True)
    if isinstance(answer, PipelineError):
        raise answer
    if answer is None:
        what, status = f"{settings.engine} in {attempt.precision}", child.exitcode or 0
        if -status in _FATAL:
            name = signal.Signals(-status).name
            raise PrecisionError(f"{what} ends with {name} on this processor")
        raise PipelineError(f"preparing {what} ended with status {status}")
    return answer


def _work(sender: Connection, settings: PrepareModelSettings, attempt: Attempt) -> None:
    # The process that waits hears it too, and ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        sender.send(prepare(settings, attempt))
    except PipelineError as error:
        sender.send(error)


def prepare(settings: PrepareModelSettings, attempt: Attempt) -> str:
    """Prepare the model in one precision, unless one is there for these settings.

    Returns:
        What happened, beginning with `made` or `found`.

    Raises:
        ConfigError: the settings ask for what there is not, or for what this host lacks.
        ParityError: what was compiled is less accurate than it may be.
    """
    model = find_model(settings.model, settings.model_revision or None)
    engine = find_engine(settings.engine)
    what = f"{model.name} for {settings.engine} {engine.version()}"
    if not is_prepared(settings.engine, settings.precision):
        return f"found {what} in {attempt.precision}: torch runs the weights as they are"
    folder = prepared_folder(
        settings.model_cache, model, settings.engine, engine.version(), settings.precision
    )
    record = read_record(folder)
    # Another processor may do more, or less.
    if (
        record is not None
        and record.get("calibration_images") == settings.calibration_images
        and record.get("instructions") == instructions()
    ):
        for step in record.get("stepped_down", ()):
            say(f"auto is not {step}")
        return f"found {what} in {record['precision']} at {folder}"
    made = make(model, settings, attempt, folder)
    return f"made {what} in {attempt.precision} at {folder}: {made}"


def make(model: Model, settings: PrepareModelSettings, attempt: Attempt, folder: Path) -> str:
    """Compile the model, compare it, and put it into its folder.

    Returns:
        How the comparison went.

    Raises:
        ParityError: what was compiled is less accurate than it may be.
        PrecisionError: the engine cannot run it here.
        ConfigError: the folder cannot be written, or images cannot be read.
    """
    engine, precision = find_engine(settings.engine), attempt.precision
    reference = load_classifier(
        settings.model, revision=settings.model_revision, threads=settings.threads
    )
    ranges = model.config.ranges
    if precision == "int8" and settings.calibration_images:
        say(f"measuring ranges on {settings.calibration_images}")
        ranges = ranges_of(
            model, Labelled.read(settings.calibration_images, reference, CALIBRATION_IMAGES)
        )
    images = Labelled.read(settings.validation_images, reference)
    what = f"{settings.engine} in {precision}"
    with _new_folder(folder) as partial:
        say(f"compiling {model.name} for {what}")
        started = time.monotonic()
        with _its_own_errors(what):
            engine.build(model, precision, ranges, partial)
            compiled = Classifier(model, engine.load(model, precision, partial, settings.threads))
            compiled.warm_up()
        say(f"compiled in {time.monotonic() - started:.1f} s")
        say(f"comparing with torch on {len(images.pixels)} images of {settings.validation_images}")
        expected = images.accuracy(reference)
        with _its_own_errors(what):
            found = images.accuracy(compiled)
        try:
            check_parity(expected, found, what)
        except ParityError as error:
            if attempt.strict:
                raise
            say(f"{error.reason}, but auto has nothing else to try")
        record = {
            "model": model.name,
            "engine": settings.engine,
            "version": engine.version(),
            "precision": precision,
            "stepped_down": attempt.steps,
            "instructions": instructions(),
            "calibration_images": settings.calibration_images,
            "images": len(images.pixels),
            "accuracy": found,
            "accuracy_of_torch_fp32": expected,
        }
        (partial / PREPARED).write_text(json.dumps(record, indent=2) + "\n")
    return f"{found:.2%} of {len(images.pixels)} images right, torch in fp32 {expected:.2%}"


@contextmanager
def _its_own_errors(what: str) -> Iterator[None]:
    """Make one error of those that engines raise where they cannot go on."""
    try:
        yield
    except (PipelineError, OSError):
        raise
    except Exception as error:
        why = " ".join(str(error).split()[:20])
        raise PrecisionError(f"{what} does not work here ({why})") from error


def ranges_of(model: Model, images: Labelled) -> Ranges:
    """The range of values at each point of the network, measured on images. Needs torch."""
    import torch

    from iot_pipeline.network import FromPixels, load_network
    from iot_pipeline.quantisation import measure_ranges

    config = model.config
    width, height = config.size
    whole = FromPixels(load_network(model), config.mean, config.std).eval()
    parts = (images.pixels[at : at + _BATCH] for at in range(0, len(images.pixels), _BATCH))
    batches = (
        torch.frombuffer(bytearray().join(part), dtype=torch.uint8).view(-1, height, width, 3)
        for part in parts
    )
    return measure_ranges(whole.network, map(whole.normalise, batches))


def say(line: str) -> None:
    """Print at once: a playbook or a person waits for it."""
    print(line, flush=True)


def _partial_name(process: int | None) -> str:
    """What names of folders that a process is filling begin with."""
    return f".partial-{process}-"


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name only once it is complete."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=_partial_name(os.getpid()), dir=folder.parent))
    except OSError as error:
        raise ConfigError(
            f"cannot write into {folder.parent} ({error.strerror}): set IOT_MODEL_CACHE"
        ) from error
    try:
        yield partial
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
