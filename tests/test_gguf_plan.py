"""`plan` and the commands on GGUF files: what they say is what a load then does."""

import json
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import gguf_files
import hybrimoe
import hybrimoe.memory.plan
import processes
from hybrimoe.cli.main import main
from hybrimoe.errors import CheckpointError, CheckpointNotFoundError, ConfigError
from hybrimoe.limits import MARGIN, HostMemory
from hybrimoe.sources import load_memory
from hybrimoe.sources.gguf.dense import LazyTensor
from paths import TINY_MOE

QUICK = ("--prompt", "def main(", "--max-new-tokens", "4", "--greedy", "--json")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """tiny-moe as files of several types, with its config.json and its tokenizer beside them."""
    folder = tmp_path_factory.mktemp("tiny")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_MOE / name, folder)
    model = AutoModelForCausalLM.from_pretrained(TINY_MOE, dtype=torch.float32)
    for kind in ("Q4_0", "Q8_0", "F16"):
        gguf_files.write(folder / f"{kind}.gguf", model, kind)
    gguf_files.write(folder / "mixed.gguf", model, mixed)
    return folder


def mixed(name: str) -> str:
    """Q4_0, but for down projections of every third layer."""
    return "Q8_0" if "down" in name and int(name.split(".")[1]) % 3 == 0 else "Q4_0"


def run(capsys, *arguments: str) -> dict:
    """The object that a command prints."""
    assert main([*arguments]) == 0
    return json.loads(capsys.readouterr().out)


# What a plan says.


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "F16", "mixed"])
def test_parts_are_those_of_the_model_that_the_call_loads(kind, tiny):
    found = hybrimoe.plan(tiny / f"{kind}.gguf")
    model = eval(found.call, {"hybrimoe": hybrimoe})
    layers = model.hybrimoe.layers
    dense = {id(t): t for t in (*model.parameters(), *model.buffers())}

    assert found.parts["experts"] == model.hybrimoe.pool.nbytes
    assert found.parts["dense"] == sum(tensor.nbytes for tensor in dense.values())
    assert found.layers == {layer.name: layer.packed.blobs.nbytes for layer in layers}
    kept = [fmt.replace("native", "float32") for fmt in found.kept.values()]
    assert kept == [layer.packed.fmt for layer in layers]
    assert (found.fits, found.checkpoint.files, found.checkpoint.mapped) == (True, 1, 0)


def test_a_mixed_file_says_how_many_layers_have_which_format(tiny):
    found = hybrimoe.plan(tiny, gguf_file="mixed.gguf")

    assert found.weights == "mixed"
    assert "as int4 in 8 layers and int4+int8 in 4 layers, RAM" in str(found)
    assert [row.weights for row in found.formats] == ["mixed"]
    assert found.model == str(tiny / "mixed.gguf")


def test_a_packed_folder_with_a_format_per_layer_is_planned(tiny, tmp_path):
    loaded = hybrimoe.from_pretrained(tiny, gguf_file="mixed.gguf")
    hybrimoe.save_packed(loaded, tmp_path)
    found = hybrimoe.plan(tmp_path)

    assert found.weights == "mixed"
    assert found.layers == {
        layer.name: layer.packed.blobs.nbytes for layer in loaded.hybrimoe.layers
    }
    again = eval(found.call, {"hybrimoe": hybrimoe})
    assert again.hybrimoe.pool.nbytes == found.parts["experts"]


def test_a_path_is_the_same_as_its_folder_and_file(tiny, monkeypatch):
    whole = hybrimoe.plan(tiny, gguf_file="Q4_0.gguf").to_dict()
    path = hybrimoe.plan(str(tiny / "Q4_0.gguf")).to_dict()
    monkeypatch.chdir(tiny)
    here = hybrimoe.plan("Q4_0.gguf")

    assert path["call"] == whole["call"]
    assert path["parts"] == whole["parts"] == here.parts
    assert here.call == "hybrimoe.from_pretrained('.', gguf_file='Q4_0.gguf')"


def test_what_takes_more_memory_than_in_the_file_is_noted(tiny):
    for kind, is_larger in (("Q8_0", False), ("mixed", False), ("F16", True)):
        text = str(hybrimoe.plan(tiny, gguf_file=f"{kind}.gguf"))
        assert ("without a format of ours are kept in a wider one" in text) == is_larger


def test_only_the_header_is_read(tiny, monkeypatch):
    def never(*_):
        pytest.fail("no weights must be read")

    hybrimoe.plan(tiny / "Q8_0.gguf")  # whatever is imported late
    monkeypatch.setattr(LazyTensor, "__getitem__", never)
    before = bytes_read()
    hybrimoe.plan(tiny / "Q8_0.gguf")

    assert bytes_read() - before < (tiny / "Q8_0.gguf").stat().st_size / 10


def bytes_read() -> int:
    path = Path("/proc/self/io")
    return int(path.read_text().split()[1]) if path.exists() else 0


def test_the_check_with_bounds_comes_before_any_parser(tiny, tmp_path, monkeypatch):
    def never(*_):
        pytest.fail("an unchecked file must not be parsed")

    whole = (tiny / "Q4_0.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    monkeypatch.setattr(gguf.GGUFReader, "__init__", never)
    for arguments in (["plan"], ["generate", "--prompt", "x"], ["bench"]):
        assert main([arguments[0], str(tmp_path / "cut.gguf"), *arguments[1:]]) == 1
    with pytest.raises(CheckpointError, match="the file is cut off"):
        hybrimoe.plan(tmp_path / "cut.gguf")


def test_without_a_config_json_the_metadata_is_enough(tiny, tmp_path):
    shutil.copy(tiny / "Q4_0.gguf", tmp_path)
    bare, whole = (hybrimoe.plan(folder / "Q4_0.gguf") for folder in (tmp_path, tiny))

    assert bare.parts["experts"] == whole.parts["experts"]
    assert bare.family == whole.family


def test_what_does_not_fit_is_offered_with_experts_on_disk(tiny):
    whole = hybrimoe.plan(tiny, gguf_file="mixed.gguf", context=64)
    found = hybrimoe.plan(tiny, gguf_file="mixed.gguf", context=64, ram=whole.peak_bytes - 2**20)
    model = eval(found.call, {"hybrimoe": hybrimoe})

    assert not found.fits
    assert "fits, with the other experts on disk" in found.nearest
    assert model.hybrimoe.pool.tier is not None
    assert {layer.packed.fmt for layer in model.hybrimoe.layers} == {"int4", "int4+int8"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": "int4"}, "weights must be left out"),
        ({"gguf_file": "config.json"}, "name of a .gguf file"),
    ],
)
def test_arguments_that_cannot_be(arguments, message, tiny, model):
    with pytest.raises(ConfigError, match=message):
        hybrimoe.plan(tiny, **{"gguf_file": "Q4_0.gguf", **arguments})
    with pytest.raises(ConfigError, match="no use with a loaded model"):
        hybrimoe.plan(model, gguf_file="Q4_0.gguf")


def test_a_file_that_is_nowhere(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        CheckpointNotFoundError, match=r"fetch it first: hf download nobody/x a\.gguf"
    ):
        hybrimoe.plan("nobody/x", gguf_file="a.gguf")
    with pytest.raises(CheckpointNotFoundError, match=r"no file '\./nowhere/a\.gguf'"):
        hybrimoe.plan("./nowhere/a.gguf")
    with pytest.raises(CheckpointNotFoundError, match=r"no file '.*a\.gguf'"):
        hybrimoe.plan(tmp_path / "a.gguf")


def test_the_load_is_refused_by_what_its_layers_really_take(tiny, monkeypatch):
    """The file is neither all int4 nor all int8."""
    need = hybrimoe.plan(tiny, gguf_file="mixed.gguf").load_peak_bytes

    def leave(free):
        have = HostMemory(free + MARGIN, "a test")
        monkeypatch.setattr(load_memory, "host_memory", lambda **_: have)

    leave(need - 2**20)
    with pytest.raises(hybrimoe.InsufficientMemoryError) as refused:
        hybrimoe.from_pretrained(tiny, gguf_file="mixed.gguf")
    assert refused.value.need == pytest.approx(need, rel=0.02)
    leave(need)
    assert hybrimoe.from_pretrained(tiny, gguf_file="mixed.gguf").hybrimoe


PEAK = """
hybrimoe.from_pretrained(sys.argv[1], gguf_file="Q8_0.gguf")  # compiles, which takes memory
found = hybrimoe.plan(sys.argv[2], gguf_file="model.gguf", context=64)
with Peak() as peak:
    model = hybrimoe.from_pretrained(sys.argv[2], gguf_file="model.gguf")
print(json.dumps({"peak": peak.last, "plan": found.load_peak_bytes}))
"""


@processes.needs_proc
def test_the_peak_of_the_load_is_foreseen(tiny, tmp_path):
    config = Qwen3MoeConfig(
        num_hidden_layers=6, hidden_size=512, moe_intermediate_size=512, num_experts=64,
        num_experts_per_tok=2, vocab_size=8192, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, intermediate_size=512,
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config)
    model.load_state_dict(
        {k: torch.zeros(v.shape) for k, v in model.state_dict().items()}, assign=True
    )
    gguf_files.write(tmp_path / "model.gguf", model, "random", "Q8_0")
    del model
    config.save_pretrained(tmp_path)
    used = processes.run(PEAK, tiny, tmp_path)

    assert 0.98 * used["peak"] <= used["plan"] <= 1.05 * used["peak"]


# What the commands do.


def test_plan_takes_the_option_or_a_path(capsys, tiny):
    option = run(capsys, "plan", str(tiny), "--gguf-file", "mixed.gguf", "--json")
    path = run(capsys, "plan", str(tiny / "mixed.gguf"), "--json")

    assert option["call"] == path["call"]
    assert (path["weights"], path["fits"]) == ("mixed", True)
    assert set(path["kept"].values()) == {"int4", "int4+int8"}


def test_generate_writes_what_the_file_says(capsys, tiny):
    written = run(capsys, "generate", str(tiny / "Q8_0.gguf"), *QUICK)
    option = run(capsys, "generate", str(tiny), "--gguf-file", "Q8_0.gguf", *QUICK)
    plain = run(capsys, "generate", str(TINY_MOE), *QUICK)

    assert written["text"] == option["text"] == plain["text"]
    assert written["weights"] == "int8"


def test_the_tokenizer_in_the_file_serves_where_none_lies_beside_it(capsys, tiny, tmp_path):
    content = json.loads((TINY_MOE / "tokenizer.json").read_text())["model"]
    model = AutoModelForCausalLM.from_pretrained(TINY_MOE, dtype=torch.float32)
    words = sorted(content["vocab"], key=content["vocab"].get)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in content["merges"]]
    gguf_files.write(tmp_path / "model.gguf", model, "Q8_0", tokenizer=(words, merges))
    shutil.copy(TINY_MOE / "config.json", tmp_path)
    written = run(capsys, "generate", str(tmp_path / "model.gguf"), *QUICK)
    beside = run(capsys, "generate", str(tiny / "Q8_0.gguf"), *QUICK)

    assert (written["prompt_tokens"], written["text"]) == (beside["prompt_tokens"], beside["text"])


def test_bench_compares_with_what_transformers_makes_of_the_file(capsys, tiny, monkeypatch):
    loaded = []
    original = AutoModelForCausalLM.from_pretrained.__func__

    def watched(cls, *arguments, **settings):
        loaded.append(settings)
        return original(cls, *arguments, **settings)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", classmethod(watched))
    sizes = ("--prompt-tokens", "8", "--tokens", "4", "--rounds", "2")
    assert main(["bench", str(tiny / "Q8_0.gguf"), "--no-keep-packed", *sizes]) == 0
    lines = capsys.readouterr().out.splitlines()

    assert [settings["gguf_file"] for settings in loaded] == ["Q8_0.gguf"]
    assert str(loaded[0]["dtype"]).removeprefix("torch.") == "float32"
    assert "Q8_0.gguf: medians of 2 rounds" in lines[0]
    assert lines[0].endswith("weights=int8")
    assert [line.split()[0] for line in lines[2:5]] == ["plain", "wrapped", "ratio"]


def test_bench_counts_the_plain_copy_in_float32(capsys, tiny, monkeypatch):
    from hybrimoe import limits as host

    found = hybrimoe.plan(tiny, gguf_file="Q4_0.gguf", context=160)
    least = found.peak_bytes + found.plain_bytes + MARGIN
    monkeypatch.setattr(host, "host_memory", lambda **_: HostMemory(least - 2**20, "a test"))
    assert main(["bench", str(tiny / "Q4_0.gguf")]) == 1

    assert found.plain_bytes > found.parts["dense"] + 6 * found.parts["experts"]
    assert "bench keeps a plain and a wrapped copy" in capsys.readouterr().err


def test_trace_records_the_routing_of_a_file(capsys, tiny, tmp_path):
    (tmp_path / "prompts").write_text("def main(\n")
    common = ("--prompts", str(tmp_path / "prompts"), "--tokens", "4", "--json", "-o")
    ours = run(capsys, "trace", str(tiny / "Q8_0.gguf"), *common, str(tmp_path / "a.npz"))
    plain = run(capsys, "trace", str(TINY_MOE), *common, str(tmp_path / "b.npz"))

    for key in ("layers", "experts", "top_k", "sequences"):
        assert ours[key] == plain[key]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["plan", "--weights", "int4"], "weights must be left out with gguf_file, got 'int4'"),
        (["generate", "--weights", "int4", "--prompt", "x"], "weights must be left out"),
        (["bench", "--weights", "native"], "weights must be left out"),
    ],
)
def test_a_format_cannot_be_asked_for(capsys, tiny, command, message):
    assert main([command[0], str(tiny / "Q4_0.gguf"), *command[1:]]) == 2
    out, err = capsys.readouterr()

    assert out == ""
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_a_file_without_any_tokenizer_is_one_line(capsys, tiny, tmp_path):
    for name in ("Q4_0.gguf", "config.json"):
        shutil.copy(tiny / name, tmp_path)
    assert main(["generate", str(tmp_path / "Q4_0.gguf"), "--prompt", "x"]) == 2
    err = capsys.readouterr().err

    assert "Q4_0.gguf has no tokenizer, neither beside the file" in err
    assert len(err.strip().splitlines()) == 1
