"""`hybrimoe warmup` names and compiles what a model will run, from its configuration alone."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import hybrimoe
from hybrimoe.cli.main import main
from hybrimoe.modules import warming
from paths import TINY_MOE


@pytest.fixture
def asked(monkeypatch):
    """What would be compiled, without doing it."""
    needs = []

    def stands_in(wanted):
        needs.extend(dict.fromkeys(wanted))
        return [(need, 0.5) for need in needs]

    monkeypatch.setattr(warming, "compile_apart", stands_in)
    return needs


def names(needs):
    return [" ".join(filter(None, need)) for need in needs]


def test_a_folder_without_weights_is_enough(asked, tmp_path):
    (tmp_path / "config.json").write_bytes((TINY_MOE / "config.json").read_bytes())
    assert main(["warmup", str(tmp_path), "--weights", "int4", "--device", "cpu"]) == 0
    assert names(asked) == ["packing int4 bfloat16", "experts int4 bfloat16"]


def test_beside_an_accelerator_policies_and_float32_come_too(asked, capsys):
    arguments = ["warmup", str(TINY_MOE), "--device", "emulated", "--json"]
    assert main(arguments) == 0
    assert names(asked) == [
        "packing bfloat16 bfloat16",
        "experts bfloat16 bfloat16",
        "experts bfloat16 float32",
        "policies",
    ]
    found = json.loads(capsys.readouterr().out)
    assert found["kernels"][-1] == {"kind": "policies", "fmt": "", "dtype": "", "seconds": 0.5}


def test_packed_folders_say_their_format(asked, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(TINY_MOE).eval()
    hybrimoe.wrap(model, weights="int8", device="cpu")
    hybrimoe.save_packed(model, tmp_path / "packed")
    assert main(["warmup", str(tmp_path / "packed"), "--device", "cpu"]) == 0
    assert names(asked) == ["experts int8 bfloat16"]


def test_without_a_name_what_is_common(asked, capsys):
    assert main(["warmup", "--device", "cpu", "--linear", "int8"]) == 0
    assert "packing int4 bfloat16" in names(asked)
    assert "linear int8 bfloat16" in names(asked)
    assert "experts int8 in bfloat16" in capsys.readouterr().out


def test_a_file_is_no_model(asked, capsys):
    assert main(["warmup", str(TINY_MOE / "config.json")]) == 2
    assert "is a file, no folder with a checkpoint" in capsys.readouterr().err
    assert not asked


def test_a_gguf_file_needs_its_folder(asked, capsys):
    assert main(["warmup", "--gguf-file", "model.gguf"]) == 2
    assert "--gguf-file needs the folder of" in capsys.readouterr().err
    assert not asked


def test_processes_fill_the_cache_and_report_nothing_the_second_time():
    need = warming.Need("norm", "", "float32")
    list(warming.compile_apart([need]))
    assert list(warming.compile_apart([need, need])) == [(need, 0.0)]


@pytest.mark.parametrize("kind", ["packing", "unpacking", "experts", "linear", "norm"])
def test_every_kind_runs_on_its_tiny_layer(kind):
    before = torch.get_default_dtype()
    warming.run_once(warming.Need(kind, "int8", "float32"))
    assert torch.get_default_dtype() == before
