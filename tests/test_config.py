"""Settings are checked once, and every refusal names the argument, the rule and the value."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrimoe.config import Config
from hybrimoe.errors import ConfigError
from hybrimoe.sizes import parse_size

FIELDS = ", ".join(field.name for field in dataclasses.fields(Config))
CPU_ONLY = "needs an accelerator, but device='cpu' runs every expert on the CPU; leave it out, got"
A_SIZE = "must be a size like '10GiB' or '800MB', bytes or a fraction"

configs = st.builds(
    Config,
    device=st.sampled_from(["auto", "cpu"]),
    weights=st.sampled_from(["native", "int8", "int4"]),
    threads=st.none() | st.integers(1, 1024),
    deterministic=st.booleans(),
)


@given(configs)
def test_a_config_survives_json(config):
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@given(configs, configs)
def test_replacing_every_field_gives_the_other_config(one, other):
    values = other.to_dict()
    del values["schema_version"]

    assert one.replace(**values) == other


@given(configs)
def test_a_config_is_hashable_and_cannot_be_changed(config):
    assert {config: 1}[config.replace()] == 1
    with pytest.raises(AttributeError):
        config.weights = "int4"


def test_from_dict_leaves_its_argument_alone():
    values = Config().to_dict()
    Config.from_dict(values)

    assert values == Config().to_dict()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": "int3"}, "weights must be one of native, int8, int4, got 'int3'"),
        ({"weights": None}, "weights must be one of native, int8, int4, got None"),
        ({"weights": ["int4"]}, "weights must be one of native, int8, int4, got ['int4']"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a positive integer, got 0"),
        ({"max_new_tokens": None}, "max_new_tokens must be a positive integer, got None"),
        ({"threads": 0}, "threads must be a positive integer or None, got 0"),
        ({"threads": -2}, "threads must be a positive integer or None, got -2"),
        ({"threads": True}, "threads must be a positive integer or None, got True"),
        ({"threads": 1025}, "threads must be at most 1024, got 1025"),
        ({"preset": ["cpu"]}, "preset must be a name or None, got ['cpu']"),
        ({"spill": ""}, "spill must be the path of a folder or None, got ''"),
        ({"threads": 2.0}, "threads must be a positive integer or None, got 2.0"),
        ({"deterministic": 1}, "deterministic must be a bool, got 1"),
        ({"vram": 0}, "vram must be positive bytes or a fraction in (0, 1], got 0"),
        ({"vram": 1.5}, "vram must be positive bytes or a fraction in (0, 1], got 1.5"),
        ({"vram": "lots"}, f"vram {A_SIZE}, got 'lots'"),
        ({"vram": [1]}, "vram must be bytes, a fraction or a size like '10GiB', got [1]"),
        ({"vram": "10GiB", "device": "cpu"}, f"vram {CPU_ONLY} '10GiB'"),
        ({"preset": "ondemand", "device": "cpu"}, f"preset {CPU_ONLY} 'ondemand'"),
        ({"weight": "int4"}, f"unknown setting 'weight'; settings are: {FIELDS}"),
    ],
)
def test_a_bad_setting_is_named_with_its_rule_and_value(settings, message):
    with pytest.raises(ConfigError) as caught:
        Config().replace(**settings)
    assert str(caught.value) == message


@pytest.mark.parametrize("name", ["scheduler", "cache", "prefetcher"])
def test_a_policy_given_by_name_is_refused(name):
    with pytest.raises(ConfigError, match=f"^{name} .*'lru'"):
        Config(device="cpu", **{name: "lru"})


@pytest.mark.parametrize("device", ["gpu", "", None, 0])
def test_an_unknown_device_is_refused_with_those_known(device):
    with pytest.raises(ConfigError, match=r"device must be one of auto, cpu.*, got ") as caught:
        Config(device=device)
    assert str(caught.value).endswith(f"got {device!r}")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schema_version": 2}, "schema_version must be 1, got 2"),
        ({"wieghts": "int4"}, f"unknown setting 'wieghts'; settings are: {FIELDS}"),
        ({"weights": "q4"}, "weights must be one of native, int8, int4, got 'q4'"),
    ],
)
def test_a_bad_dict_is_refused(values, message):
    with pytest.raises(ConfigError) as caught:
        Config.from_dict(values)
    assert str(caught.value) == message


def test_a_config_error_is_a_value_error():
    with pytest.raises(ValueError, match="weights must be"):
        Config(weights="q4")


@given(st.integers(1, 1 << 50))
def test_bytes_are_taken_as_they_are(size):
    assert parse_size("vram", size) == size
    assert parse_size("vram", str(size)) == size


@given(st.integers(1, 4096), st.sampled_from("kmgt"), st.booleans(), st.sampled_from(["", " "]))
def test_units_of_1000_and_of_1024_are_told_apart(number, letter, binary, space):
    unit = f"{letter}ib" if binary else f"{letter}b"
    power = "kmgt".index(letter) + 1

    for text in (f"{number}{space}{unit}", f" {number}{space}{unit.upper()} "):
        assert parse_size("vram", text) == number * (1024 if binary else 1000) ** power


@given(st.floats(0, 1, exclude_min=True))
def test_a_float_is_a_fraction(fraction):
    assert parse_size("vram", fraction) == fraction


@given(st.text() | st.floats() | st.integers() | st.booleans() | st.none())
def test_any_value_gives_a_positive_size_or_an_error_that_shows_it(value):
    try:
        size, message = parse_size("vram", value), ""
    except ConfigError as error:
        size, message = 1, str(error)

    assert size > 0
    assert not message or (message.startswith("vram must be ") and repr(value) in message)


@pytest.mark.parametrize("fraction", [0.25, 1.0])
def test_text_may_be_a_fraction_too(fraction):
    assert parse_size("vram", str(fraction)) == fraction


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1GiB", "0", "0.0", "1.5", "0.2B", "nan", "inf", "1e999", "10 XB"]
)
def test_text_that_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match="vram must be a size like"):
        parse_size("vram", text)
