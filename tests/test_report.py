"""The report says the same as text and as a table, and what became of the accelerator's memory."""

import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

import hybrimoe
from hybrimoe.report import LayerReport, Report
from hybrimoe.runtime.devices.emulated import EmulatedAccelerator
from hybrimoe.runtime.slot_budget import SPARE
from small_model import LAYERS, SLOT, Fails, load_small, tokens, wrap_on


@pytest.fixture(scope="module")
def plain():
    return load_small()


@pytest.fixture
def model(plain):
    yield plain
    hybrimoe.unwrap(plain)


class Table(HTMLParser):
    """The texts of a table's cells by row; any tag left open, or of another kind, is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        assert tag in ("table", "tr", "th", "td")
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag != "table":
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        assert self.open[-1] in ("th", "td")
        self.rows[-1][-1] += text


def as_table(report: Report) -> list[list[str]]:
    return Table(report._repr_html_()).rows


def lines(report: Report) -> dict[str, str]:
    """What the text says, by the word that a line starts with."""
    return {line[2:11].strip(): line[12:] for line in str(report).splitlines()[1:]}


def of_one_layer(**changes) -> Report:
    layer = LayerReport("layers.0.experts", 2, 4.0, 0.5, 10.0)
    values = {
        **{"weights": "native", "format": "bfloat16", "threads": 2},
        **{"expert_bytes_before": 1 << 21, "expert_bytes_after": 1 << 20},
        **{"prefill_tokens": 6, "prefill_s": 0.5, "decode_tokens": 8, "decode_s": 0.5},
        **{"experts_s": 0.25, "layers": (layer,)},
    }
    return Report(**values | changes)


def test_the_text_of_a_cpu_alone():
    assert str(of_one_layer()).splitlines() == [
        "hybrimoe: 1 layers of experts on the CPU, 2 threads",
        "  format    bfloat16: 2.0 MiB of experts before, 1.0 MiB now",
        "  prefill   6 tokens in 0.50 s: 12.0 tokens/s",
        "  decode    8 tokens in 0.50 s: 16.0 tokens/s",
        "  time      1.00 s: experts 25%, the rest of the model 75%",
        "  slowest   layers.0.experts: 0.500 ms per launch, 4.0 experts, 10.0 GB/s of weights",
    ]


def test_the_table_has_a_row_per_line_and_says_the_same(model, monkeypatch):
    wrap_on(monkeypatch, model, EmulatedAccelerator(), vram=0.5)
    tokens(model)
    report = model.hybrimoe.report()
    title, *rows = as_table(report)

    assert [f"  {name:9} {text}" for name, text in rows] == str(report).splitlines()[1:]
    assert title == str(report).splitlines()[:1]
    assert {"format", "decode", "cache", "experts", "busy", "idle", "slowest"} <= {
        name for name, _ in rows
    }


def test_ipython_shows_the_text_where_it_has_no_tables():
    report, shown = of_one_layer(), []
    report._repr_pretty_(SimpleNamespace(text=shown.append), cycle=False)

    assert shown == [str(report)]


def test_names_cannot_break_the_table():
    layer = LayerReport("<script>&\"'", 1, 1.0, 1.0, 1.0)
    rows = as_table(of_one_layer(layers=(layer,)))

    assert rows[-1][1].startswith("<script>&\"':")


def test_before_any_token_there_is_nothing_to_say_of_speed(model, monkeypatch):
    wrap_on(monkeypatch, model, EmulatedAccelerator(), vram=0.5)

    assert list(lines(model.hybrimoe.report())) == ["format", "prefill", "decode"]


def test_slots_that_were_given_up_are_named_with_the_reason(model, monkeypatch):
    accelerator = EmulatedAccelerator(30 * SLOT)
    wrap_on(monkeypatch, model, accelerator, vram=0.5)
    found = lines(model.hybrimoe.report())

    assert re.fullmatch(rf"{30 - SPARE} of 48 slots left: .*do not fit.*", found["memory"])
    tokens(model)
    assert lines(model.hybrimoe.report())["cache"].startswith(f"{30 - SPARE} slots")


def test_without_slots_no_cache_is_told_of(model, monkeypatch):
    """None fitted at the start, so the CPU has everything."""
    wrap_on(monkeypatch, model, EmulatedAccelerator(4 * SLOT))
    tokens(model)
    found = lines(model.hybrimoe.report())

    assert found["memory"].startswith("no slots: ")
    assert "cache" not in found
    assert found["experts"] == "0% on the accelerator, 100% on the CPU"


@pytest.mark.filterwarnings("ignore:emulated keeps")
def test_slots_lost_on_the_way_are_counted_from_the_first(model, monkeypatch):
    accelerator = EmulatedAccelerator()
    wrap_on(monkeypatch, model, accelerator, vram=LAYERS * SLOT)
    accelerator.fault = Fails("experts", times=10**9)
    tokens(model)
    found = lines(model.hybrimoe.report())

    assert (
        found["memory"] == f"0 of {LAYERS} slots left: CUDA out of memory. Tried to allocate 2 GiB"
    )
    assert "cache" not in found


def test_all_is_well_with_the_memory_that_lost_nothing(model, monkeypatch):
    wrap_on(monkeypatch, model, EmulatedAccelerator(), vram=0.5)
    tokens(model)

    assert "memory" not in lines(model.hybrimoe.report())


def test_compiling_within_a_pass_has_a_line_of_its_own():
    assert "compiled" not in lines(of_one_layer())
    assert lines(of_one_layer(compile_s=3.0))["compiled"].startswith("kernels for 3.00 s")
