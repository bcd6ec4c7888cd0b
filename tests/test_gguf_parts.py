"""A split GGUF model is read from its first file, if all others lie beside it."""

import shutil

import gguf
import pytest

import hybrimoe
from gguf_models import assert_computes, assert_refused, load, logits_of, nmse, qwen3, write
from hybrimoe.cli.main import main
from hybrimoe.errors import CheckpointNotFoundError
from hybrimoe.sources.gguf.parts import part_names

FIRST, SECOND, THIRD = part_names("model-00001-of-00003.gguf")


@pytest.fixture
def model():
    return qwen3()


@pytest.fixture
def folder(model, tmp_path):
    return write(tmp_path, model, parts=3)


def test_all_parts_together_are_the_model(model, folder):
    assert sorted(path.name for path in folder.iterdir()) == [FIRST, SECOND, THIRD]
    assert_computes(folder, model, FIRST)
    found = hybrimoe.plan(folder / FIRST)

    assert found.checkpoint.files == 3
    assert found.checkpoint.tensors == 27
    assert main(["plan", str(folder / FIRST), "--json"]) == 0


@pytest.mark.parametrize("layout", ["merged", "single"])
def test_experts_may_lie_in_several_parts(layout, model, tmp_path):
    assert_computes(write(tmp_path, model, layout=layout, parts=3), model, FIRST)


@pytest.mark.parametrize(
    "layout",
    [{"layout": "merged"}, {"layout": "single"}, {"parts": 3}, {"nextn_predict_layers": 1}],
)
def test_bench_needs_what_transformers_reads_too(layout, model, capsys, tmp_path):
    """It fills what it does not find with random numbers."""
    write(tmp_path, model, **layout)
    assert main(["bench", str(tmp_path / (FIRST if "parts" in layout else "model.gguf"))]) == 2
    err = capsys.readouterr().err
    assert "the model must be one that transformers reads too" in err
    assert len(err.strip().splitlines()) == 1


def test_they_are_read_from_the_disk_tier_too(model, folder):
    assert nmse(logits_of(load(folder, FIRST, ram=0.5)), logits_of(model)) < 1e-10


def test_a_part_that_is_missing_is_named_and_how_to_join_them(folder):
    (folder / SECOND).unlink()
    error = assert_refused(
        folder, "is missing: .* needs all its 3 files.*llama-gguf-split --merge", FIRST
    )
    assert error.path == str(folder / SECOND)


def test_another_than_the_first_part_is_refused(folder):
    assert_refused(folder, f"give the first, {FIRST}, or join them", SECOND)


def test_a_part_of_another_name_is_refused(folder):
    shutil.move(folder / FIRST, folder / "model.gguf")
    assert_refused(folder, "one of 3 files of a split model, and must be named", "model.gguf")


def test_parts_in_a_wrong_order_are_refused(folder):
    shutil.move(folder / SECOND, folder / "other")
    shutil.move(folder / THIRD, folder / SECOND)
    shutil.move(folder / "other", folder / THIRD)
    assert_refused(folder, "split.no = 1 by its name, got 2", FIRST)


def test_a_part_of_another_model_is_refused(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    write(other, qwen3(num_hidden_layers=3), parts=3)
    shutil.copy(other / SECOND, folder / SECOND)
    assert_refused(folder, "is in .* as well|split.tensors.count", FIRST)


def rewritten(folder, name: str, **values) -> None:
    """A part with other metadata and no tensors."""
    writer = gguf.GGUFWriter(folder / name, "qwen3moe")
    writer.kv_data[0].clear()
    for key, value in values.items():
        writer.add_uint32(key.replace("__", "."), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"split__no": 1, "split__count": 3}, "split.tensors.count = 18"),
        ({"split__no": 1, "split__count": 2}, "split.count = 3 by its name, got 2"),
        ({}, "split.no = 1 by its name, got None"),
        (
            {"split__no": 1, "split__count": 3, "qwen3moe__expert_used_count": 4},
            "has qwen3moe.expert_used_count = '4', which",
        ),
    ],
    ids=str,
)
def test_a_part_that_says_something_else_is_refused(values, reason, folder):
    rewritten(folder, SECOND, **values)
    assert_refused(folder, reason, FIRST)


def test_a_damaged_part_is_refused_by_its_name(folder):
    content = (folder / THIRD).read_bytes()
    (folder / THIRD).write_bytes(content[: len(content) // 2])
    assert assert_refused(folder, "the file is cut off", FIRST).path == str(folder / THIRD)


def test_all_parts_are_fetched_from_the_hub(monkeypatch, folder, model):
    from hybrimoe import pretrained
    from hybrimoe.sources.gguf import model as gguf_file

    fetched = []
    monkeypatch.setattr(pretrained, "look_for", lambda *_: None)
    monkeypatch.setattr(gguf_file, "reach", lambda name, place, file: dict(place))

    def cached_file(name, file, **_):
        fetched.append(file)
        return str(folder / file)

    monkeypatch.setattr(gguf_file, "cached_file", cached_file)
    loaded = load("somebody/some-model", FIRST)

    assert fetched[:3] == [FIRST, SECOND, THIRD]
    assert nmse(logits_of(loaded), logits_of(model)) < 1e-10


def test_a_part_that_the_hub_lacks_is_a_typed_error(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointNotFoundError, match="somebody/some-model"):
        load("somebody/some-model", FIRST)
