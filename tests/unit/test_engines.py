"""Engines: which there are, what they refuse, and that all of them see what torch sees."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from iot_pipeline import cli, prepare
from iot_pipeline.classifier import PREPARED, load_classifier, prepared_folder
from iot_pipeline.engines import (
    MODULES,
    PRECISIONS,
    EngineError,
    PrecisionError,
    find_engine,
    ladder,
)
from iot_pipeline.errors import ConfigError, Exit
from iot_pipeline.model import Model, find_model
from iot_pipeline.prepare import Attempt, ParityError, check_parity
from iot_pipeline.processor import instructions
from iot_pipeline.settings import PrepareModelSettings, load

if importlib.util.find_spec("torch") and importlib.util.find_spec("timm"):
    # The tools' numpy is another than torch was built with, of which torch warns once.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("timm")

ROOT = Path(__file__).parents[2]
MODEL = find_model()
UNCALIBRATED = replace(MODEL, config=replace(MODEL.config, ranges=None))

with_torch = pytest.mark.skipif(
    not importlib.util.find_spec("torch"), reason="PyTorch is not installed"
)


def needs(*packages: str) -> pytest.MarkDecorator:
    missing = [name for name in packages if not importlib.util.find_spec(name)]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


COMPILED = [
    pytest.param(name, precision, marks=needs("torch", package), id=f"{name}-{precision}")
    for name, package in (("openvino", "openvino"), ("onnxruntime", "onnxruntime"))
    for precision in PRECISIONS[name]
]


def settings(cache: Path, **changes: Any) -> PrepareModelSettings:
    return load(PrepareModelSettings, {"model_cache": str(cache), "threads": 1, **changes}, {})


def images() -> list[Image.Image]:
    return [Image.effect_noise((32, 32), sigma).convert("RGB") for sigma in (10, 40, 80, 120, 160)]


def test_every_engine_has_its_module_and_precisions() -> None:
    assert set(MODULES) == set(PRECISIONS)
    for name in MODULES.values():
        assert importlib.util.find_spec(name)
    assert all("fp32" in known for known in PRECISIONS.values())


def test_the_role_knows_the_same_engines_and_precisions() -> None:
    role = ROOT / "roles/inference_node"
    known = yaml.safe_load((role / "vars/main.yml").read_text())["_inference_node_precisions"]
    assert {name: tuple(precisions) for name, precisions in known.items()} == PRECISIONS
    specs = yaml.safe_load((role / "meta/argument_specs.yml").read_text())
    options = specs["argument_specs"]["main"]["options"]
    assert options["inference_node_engine"]["choices"] == list(MODULES)


def test_settings_offer_every_engine_and_precision() -> None:
    for name in MODULES:
        for precision in (*PRECISIONS[name], "auto"):
            loaded = load(PrepareModelSettings, {"engine": name, "precision": precision}, {})
            assert (loaded.engine, loaded.precision) == (name, precision)


def test_an_engine_that_is_not_installed_names_the_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.delitem(sys.modules, MODULES["openvino"], raising=False)
    with pytest.raises(EngineError, match=r"inference_node_engine.*inference-openvino") as caught:
        find_engine("openvino")
    assert "IOT_ENGINE" in str(caught.value)
    assert caught.value.exit_status == Exit.CONFIG


def test_an_unknown_engine_is_refused_with_those_there_are() -> None:
    with pytest.raises(EngineError, match="torch, torch-compile, onnxruntime, openvino"):
        find_engine("tensorflow")


@pytest.mark.parametrize(
    "engine,precision,model,calibrated,chosen",
    [
        ("torch", "auto", MODEL, False, ("fp32",)),
        ("openvino", "auto", MODEL, False, ("int8", "fp32")),
        ("onnxruntime", "auto", MODEL, False, ("int8", "fp32")),
        ("openvino", "auto", UNCALIBRATED, False, ("fp32",)),
        # Images are for who asks for int8: a service without them would look for another model.
        ("openvino", "auto", UNCALIBRATED, True, ("fp32",)),
        ("openvino", "int8", UNCALIBRATED, True, ("int8",)),
        ("openvino", "bf16", UNCALIBRATED, False, ("bf16",)),
    ],
)
def test_precisions_to_try(
    engine: str, precision: str, model: Model, calibrated: bool, chosen: tuple[str, ...]
) -> None:
    assert ladder(engine, precision, model, calibrated=calibrated) == chosen


@pytest.mark.parametrize(
    "engine,precision,words",
    [
        ("torch", "int8", r"only fp32, bf16; onnxruntime, openvino would have it.*IOT_ENGINE"),
        ("onnxruntime", "bf16", r"only fp32, int8; torch, torch-compile, openvino would"),
        ("openvino", "int8", r"IOT_CALIBRATION_IMAGES.*inference_node_calibration_images"),
    ],
)
def test_a_precision_that_there_is_not_is_refused_with_what_there_is(
    engine: str, precision: str, words: str
) -> None:
    with pytest.raises(EngineError, match=words):
        ladder(engine, precision, UNCALIBRATED, calibrated=False)


@pytest.mark.parametrize(
    "change",
    [
        {"engine": "onnxruntime"},
        {"version": "2"},
        {"precision": "fp32"},
        {"precision": "auto"},
        {"model": replace(MODEL, digest="0" * 64)},
        {"model": replace(MODEL, config=replace(MODEL.config, mean=(0.0, 0.0, 0.0)))},
        {"model": UNCALIBRATED},
    ],
    ids=["engine", "version", "precision", "auto", "weights", "normalisation", "ranges"],
)
def test_a_prepared_model_is_found_by_all_that_it_depends_on(change: dict[str, Any]) -> None:
    inputs = {"model": MODEL, "engine": "openvino", "version": "1", "precision": "int8"}
    same = prepared_folder("/cache", **inputs)  # type: ignore[arg-type]
    assert same == prepared_folder("/cache", **inputs)  # type: ignore[arg-type]
    assert same != prepared_folder("/cache", **{**inputs, **change})


def test_ranges_matter_to_int8_alone() -> None:
    for precision, equal in (("fp32", True), ("int8", False), ("auto", False)):
        folders = {
            prepared_folder("/cache", model, "openvino", "1", precision)
            for model in (MODEL, UNCALIBRATED)
        }
        assert (len(folders) == 1) is equal


@pytest.mark.parametrize(
    "engine,precision",
    [
        pytest.param("openvino", "int8", marks=needs("openvino")),
        pytest.param("torch", "bf16", marks=needs("torch", "timm")),
    ],
)
def test_a_model_that_is_not_prepared_is_an_error_that_says_what_to_do(
    tmp_path: Path, engine: str, precision: str
) -> None:
    with pytest.raises(EngineError, match="run `iot-pipeline prepare-model`") as caught:
        load_classifier(engine=engine, precision=precision, cache=tmp_path)
    assert "inference_node_engine" in str(caught.value)


@pytest.mark.parametrize("engine,precision", COMPILED)
def test_a_compiled_engine_sees_what_torch_sees(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], engine: str, precision: str
) -> None:
    chosen = settings(tmp_path, engine=engine, precision=precision)
    try:
        assert prepare.prepare(chosen, Attempt(precision)).startswith("made ")
    except PrecisionError as error:
        if precision != "bf16":
            raise
        pytest.skip(error.reason)
    assert prepare.run(chosen) == Exit.OK
    assert capsys.readouterr().out.splitlines()[-1].startswith("found ")

    compiled = load_classifier(engine=engine, precision=precision, cache=tmp_path, threads=1)
    torch = load_classifier(threads=1)
    assert compiled.name == torch.name
    pixels = [torch.prepare(image) for image in images()]
    together = compiled.predict(pixels)
    # Rounding shows in how sure it is. The images are noise, so it is not sure at all.
    near = 0.15 if precision == "int8" else 0.02 if precision == "bf16" else 1e-4
    for number, expected in enumerate(torch.predict(pixels)):
        assert together[number].confidence == pytest.approx(expected.confidence, abs=near)
        alone = compiled.predict(pixels[number : number + 1])[0]
        assert alone.confidence == pytest.approx(together[number].confidence, abs=1e-2)
    assert compiled.predict([]) == []


INT16 = 32_767


def integer_weights(network: Path) -> list[Any]:
    """The int8 weights of a network in ONNX or in OpenVINO's format, an array a layer."""
    import openvino

    from iot_pipeline.engines import open_vino

    core = open_vino._core()
    weights = []
    for node in core.read_model(network).get_ops():
        if not node.get_output_size() or node.get_element_type() != openvino.Type.i8:
            continue
        try:
            # What is computed of constants alone.
            alone = openvino.Model([node.output(0)], [])
        except RuntimeError:
            continue  # It needs the input.
        values = core.compile_model(alone, "CPU")([])[0]
        if values.ndim > 1:
            weights.append(values)
    return weights


@needs("torch", "openvino", "onnxruntime")
@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_two_products_fit_into_16_bits(tmp_path: Path, engine: str) -> None:
    """A processor without VNNI adds a pair of them in 16 bits, which saturate."""
    import onnxruntime
    from torch import nn

    from iot_pipeline.network import load_network
    from iot_pipeline.quantisation import LARGEST_WEIGHT

    find_engine(engine).build(MODEL, "int8", MODEL.config.ranges, tmp_path)
    (file,) = tmp_path.glob("model.[ox]*")
    if engine == "onnxruntime":
        # What it makes of the file, in operators that all know.
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        file = tmp_path / "optimised.onnx"
    layers = [
        layer for layer in load_network(MODEL).modules() if isinstance(layer, nn.Conv2d | nn.Linear)
    ]
    weights = integer_weights(file)
    assert len(weights) == len(layers)
    for layer in weights:
        # Kernels pair channels or pixels, each in an order of its own: any two may meet.
        assert 2 * 255 * abs(layer.astype(int)).max() <= INT16
        assert abs(layer.astype(int)).max() == LARGEST_WEIGHT


@needs("torch", "openvino")
def test_a_signal_is_heard_after_models_were_loaded_and_dropped(tmp_path: Path) -> None:
    """In a process of its own, which it would end."""
    find_engine("openvino").build(MODEL, "fp32", None, tmp_path)
    script = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from iot_pipeline.engines import open_vino\n"
        "from iot_pipeline.model import find_model\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('heard'))\n"
        f"first = open_vino.load(find_model(), 'fp32', Path({str(tmp_path)!r}), 1)\n"
        f"second = open_vino.load(find_model(), 'fp32', Path({str(tmp_path)!r}), 1)\n"
        "del first\n"
        "del second\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": ":".join(path for path in sys.path if path)},
        check=False,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "heard\n"), done.stderr


@needs("torch", "openvino", "onnxruntime")
@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_a_service_with_a_prepared_model_does_not_import_torch(tmp_path: Path, engine: str) -> None:
    prepare.prepare(settings(tmp_path, engine=engine), Attempt("int8"))
    script = (
        "import sys\n"
        "from iot_pipeline.classifier import load_classifier\n"
        f"load_classifier(engine={engine!r}, cache={str(tmp_path)!r}, threads=1).warm_up()\n"
        "print({'torch', 'timm'} & set(sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": ":".join(path for path in sys.path if path)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "set()"


@with_torch
def test_torch_in_single_precision_needs_no_preparation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare.run(settings(tmp_path)) == Exit.OK
    assert capsys.readouterr().out.startswith("found ")
    assert list(tmp_path.iterdir()) == []


def test_parity() -> None:
    check_parity(0.883, 0.878, "as much as is allowed")
    check_parity(0.883, 0.9, "better")
    with pytest.raises(ParityError, match=r"this gets 87\.79%.*torch in single precision 88\.30%"):
        check_parity(0.883, 0.8779, "this")


def local_model(folder: Path, ranges: dict[str, tuple[float, float]] | None) -> str:
    """The shipped weights with other ranges; returns how settings name them."""
    folder.mkdir()
    config = json.loads((ROOT / "apps/models/config.json").read_text())
    del config["activation_ranges"]
    if ranges:
        config["activation_ranges"] = ranges
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(MODEL.weights)
    return f"local-dir:{folder}"


@pytest.fixture
def poor(tmp_path: Path) -> str:
    """A model whose ranges are wrong, so that int8 sees little."""
    return local_model(tmp_path / "poor", dict.fromkeys(MODEL.config.ranges or {}, (0.0, 0.01)))


@needs("torch", "openvino")
def test_a_less_accurate_model_is_refused_and_not_kept(tmp_path: Path, poor: str) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(ParityError, match=r"openvino in int8.*inference_node_precision") as caught:
        prepare.run(settings(cache, engine="openvino", model=poor, precision="int8"))
    assert caught.value.exit_status == Exit.FAILED
    assert list(cache.iterdir()) == []


@pytest.mark.timeout(600)
@needs("torch", "openvino")
def test_auto_steps_down_from_a_less_accurate_model(
    tmp_path: Path, poor: str, capfd: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    chosen = settings(cache, engine="openvino", model=poor)
    why = "int8: openvino in int8 gets "
    assert prepare.run(chosen) == Exit.OK
    *lines, last = capfd.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith(f"auto is not {why}")]
    assert last.startswith("made ")
    assert " in fp32 at " in last
    (file,) = cache.glob(f"*/{PREPARED}")
    written = file.read_bytes()
    record = json.loads(written)
    assert record["precision"] == "fp32"
    assert [step.startswith(why) for step in record["stepped_down"]] == [True]

    assert prepare.run(chosen) == Exit.OK
    told, found = capfd.readouterr().out.splitlines()
    assert told.startswith(f"auto is not {why}")
    assert found.startswith("found ")
    assert " in fp32 at " in found
    assert file.read_bytes() == written

    # The service takes what was made, and decides nothing.
    pixels = [load_classifier(threads=1).prepare(image) for image in images()]
    seen = load_classifier(poor, engine="openvino", cache=cache, threads=1).predict(pixels)
    for prediction, expected in zip(seen, load_classifier(threads=1).predict(pixels), strict=True):
        assert prediction.confidence == pytest.approx(expected.confidence, abs=1e-4)


# An ONNX Runtime that has an instruction for int8 that the processor has not.
TOO_NEW = """
import importlib, os, pathlib, signal, sys

sys.path.remove(os.path.dirname(os.path.dirname(__file__)))
del sys.modules["onnxruntime"]
real = importlib.import_module("onnxruntime")

class Session(real.InferenceSession):
    def __init__(self, path, *arguments, **options):
        if b"QuantizeLinear" in pathlib.Path(path).read_bytes():
            os.kill(os.getpid(), signal.SIGILL)
        super().__init__(path, *arguments, **options)

real.InferenceSession = Session
"""


@pytest.fixture
def too_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "onnxruntime"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(TOO_NEW)
    monkeypatch.syspath_prepend(package.parent)


@needs("torch", "onnxruntime")
@pytest.mark.usefixtures("too_new")
def test_auto_steps_down_from_what_the_processor_lacks(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    assert prepare.run(settings(cache, engine="onnxruntime")) == Exit.OK
    *lines, last = capfd.readouterr().out.splitlines()
    why = "int8: onnxruntime in int8 ends with SIGILL on this processor"
    assert f"auto is not {why}" in lines
    assert last.startswith("made ")
    (folder,) = cache.iterdir()
    record = json.loads((folder / PREPARED).read_text())
    assert (record["precision"], record["stepped_down"]) == ("fp32", [why])


@needs("torch", "onnxruntime")
@pytest.mark.usefixtures("too_new")
def test_what_the_processor_lacks_names_the_variables(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(PrecisionError, match=r"SIGILL.*inference_node_engine") as caught:
        prepare.run(settings(cache, engine="onnxruntime", precision="int8"))
    assert caught.value.exit_status == Exit.CONFIG
    assert list(cache.iterdir()) == []


@needs("torch", "onnxruntime")
def test_another_processor_gets_a_model_of_its_own(tmp_path: Path) -> None:
    chosen = settings(tmp_path, engine="onnxruntime")
    prepare.prepare(chosen, Attempt("fp32"))
    (file,) = tmp_path.glob(f"*/{PREPARED}")
    record = json.loads(file.read_text())
    assert record["instructions"] == instructions()
    file.write_text(json.dumps({**record, "instructions": ["another"]}))
    assert prepare.prepare(chosen, Attempt("fp32")).startswith("made ")
    assert json.loads(file.read_text()) == record


@pytest.mark.skipif("avx512bw" in instructions(), reason="this processor computes bfloat16")
@pytest.mark.parametrize("engine", ["torch", pytest.param("openvino", marks=needs("openvino"))])
@needs("torch")
def test_bfloat16_is_refused_where_the_processor_has_none(tmp_path: Path, engine: str) -> None:
    with pytest.raises(PrecisionError, match=r"processor.*inference_node_precision"):
        prepare.prepare(settings(tmp_path, engine=engine, precision="bf16"), Attempt("bf16"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(600)
@needs("torch", "openvino")
def test_ranges_can_be_measured_on_the_host(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model without ranges: fp32 by default, int8 refused, and had with images."""
    chosen = {"model": local_model(tmp_path / "model", None), "engine": "openvino"}
    cache = tmp_path / "cache"

    prepare.run(settings(cache, **chosen))
    lines = capsys.readouterr().out.splitlines()
    assert "auto is fp32" in lines[0]
    assert "in fp32" in lines[-1]
    chosen["precision"] = "int8"
    with pytest.raises(EngineError, match="IOT_CALIBRATION_IMAGES"):
        prepare.run(settings(cache, **chosen))
    sample = str(ROOT / "apps/src/iot_pipeline/data/sample.tar.xz")
    images_of_its_own = settings(cache, **chosen, calibration_images=sample)
    assert prepare.prepare(images_of_its_own, Attempt("int8")).startswith("made ")
    load_classifier(chosen["model"], engine="openvino", precision="int8", cache=cache).warm_up()
    # Other images make another model, under the same name.
    others = settings(cache, **chosen, calibration_images="sample")
    assert prepare.prepare(others, Attempt("int8")).startswith("made ")
    assert len(list(cache.glob(f"*int8*/{PREPARED}"))) == 1


@needs("torch", "openvino")
def test_images_of_other_things_compare_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "images" / "pelican"
    folder.mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(folder / "1.png")
    with pytest.raises(ConfigError, match=r"pelican.*inference_node_validation_images"):
        prepare.prepare(
            settings(tmp_path / "c", engine="openvino", validation_images=str(folder.parent)),
            Attempt("int8"),
        )


@needs("torch", "openvino")
def test_a_folder_that_cannot_be_written_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="IOT_MODEL_CACHE"):
        prepare.prepare(settings(tmp_path / "file" / "cache", engine="openvino"), Attempt("int8"))


@with_torch
def test_torch_compile_needs_torch_2(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.delattr(torch, "compile", raising=False)
    with pytest.raises(EngineError, match=r"torch 2 or later.*inference_node_engine"):
        find_engine("torch-compile")


def test_the_command_line_says_why_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["prepare-model", "--engine", "torch-compile", "--precision", "int8"]
    assert cli.main([*arguments, "--model-cache", str(tmp_path)]) == Exit.CONFIG
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("iot-pipeline prepare-model: the engine torch-compile has no precision")


@needs("torch", "openvino")
def test_an_image_that_cannot_be_read_names_its_source(tmp_path: Path) -> None:
    folder = tmp_path / "images" / "cat"
    folder.mkdir(parents=True)
    (folder / "1.png").write_bytes(b"junk")
    with pytest.raises(ConfigError, match="images holds an image that cannot be read"):
        prepare.prepare(
            settings(tmp_path / "c", engine="openvino", validation_images=str(folder.parent)),
            Attempt("int8"),
        )
