"""``docs/step.md`` shows what was counted, and the counts say what the page claims of them."""

import json
import re
from pathlib import Path

import pytest
import yaml

from mc2_hpc.models.presets import PRESETS, num_parameters

ROOT = Path(__file__).parents[1]
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "step_counts.json").read_text(encoding="utf-8"))
KEYS = {
    "products, TFLOP": "products_tflop",
    "of the text tower, TFLOP": "text_tflop",
    "of the loss, TFLOP": "loss_tflop",
    "traffic of other operators, GB": "traffic_gb",
    "kernels": "kernels",
    "products": "products",
    "kernels of the loss": "loss_kernels",
    "copies on the device": "device_copies",
    "memsets": "memsets",
    "sends and receives of the loss": "loss_point_to_point",
    "collectives of the loss": "loss_collectives",
    "all-reduced, GB": "all_reduced_gb",
    "gathered, GB": "gathered_gb",
    "reduce-scattered, GB": "reduce_scattered_gb",
    "token table, MB": "table_mb",
    "sends and receives of the table": "table_point_to_point",
    "ids between hosts, kB": "table_host_kb",
    "waits for a stream": "stream_synchronisations",
    "waits for the device": "device_synchronisations",
    "waits for the step before": "event_waits",
    "pageable uploads": "pageable_uploads",
    "pageable read-backs": "pageable_read_backs",
    "pinned copies": "pinned_copies",
    "memory after a step, GiB": "allocated_gib",
    "peak memory, GiB": "peak_gib",
    "peak reserved, GiB": "reserved_gib",
}


KINDS = ("none", "selective", "full")


@pytest.fixture(scope="module")
def counted():
    """Rows by (tree, ranks, ZeRO stage)."""
    return {(row["tree"], row["ranks"], row["stage"]): row for row in RESULTS["rows"]}


def test_the_tables_are_the_rows(counted):
    page = (ROOT / "docs" / "step.md").read_text(encoding="utf-8")
    compared = 0
    for part in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        if not (heading := re.match(r"On (\d+) GPUs?\n", part)):
            continue
        header, _, *lines = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("|")]
        stages = [int(cell.removeprefix("ZeRO ").replace("no ZeRO", "0")) for cell in header]
        assert {line[0] for line in lines} == set(KEYS)
        for label, *cells in lines:
            for stage, cell in zip(stages, cells, strict=True):
                before, _, now = cell.replace(",", "").partition(" → ")
                rows = [counted[tree, int(heading[1]), stage] for tree in ("before", "now")]
                assert [float(before), float(now or before)] == [row[KEYS[label]] for row in rows], (label, stage)
                compared += 2
    assert compared == len(counted) * len(KEYS)


def section(heading):
    page = (ROOT / "docs" / "step.md").read_text(encoding="utf-8")
    return page.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]


def test_the_table_of_fused_kernels_is_the_rows():
    """Kernels, traffic and peak with PyTorch's operators and with the Triton kernels, by stage and recomputation."""
    rows = {(row["stage"], row["recompute"], row["kernels_of_blocks"]): row for row in RESULTS["fused_rows"]}
    table = section("Recomputation and fused kernels").splitlines()
    lines = [line.strip("| ").split(" | ") for line in table if re.match(r"\| [123] \|", line)]
    assert len(lines) == 9 and len(rows) == 18
    for stage, recompute, *cells in lines:
        pair = [rows[int(stage), recompute.strip("`"), backend] for backend in ("torch", "triton")]
        for cell, key in zip(cells, ("kernels", "traffic_gb", "peak_gib"), strict=True):
            assert [float(number) for number in cell.replace(",", "").split(" → ")] == [row[key] for row in pair]
        # With PyTorch's operators selective recomputation repeats products at ZeRO 3.
        assert pair[0]["products_tflop"] >= pair[1]["products_tflop"]
    assert max(rows[1, kind, "triton"]["traffic_gb"] / rows[1, kind, "torch"]["traffic_gb"] for kind in KINDS) < 0.4
    for stage in (1, 2):
        assert rows[stage, "selective", "triton"]["traffic_gb"] < 250
        assert rows[stage, "selective", "triton"]["kernels"] < 2500
        assert rows[stage, "selective", "triton"]["kernels"] == rows[stage, "none", "triton"]["kernels"]


def test_what_is_left_of_the_traffic_is_the_rows():
    """The table has the numbers in their order; they add up to the row of that stage."""
    page = (ROOT / "docs" / "step.md").read_text(encoding="utf-8")
    counts = dict(RESULTS["fused_breakdown_gb"])
    step = {key: counts.pop(key) for key in ("ranks", "stage", "recompute")} | {"kernels_of_blocks": "triton"}
    table = page[page.index(f"with `{step['recompute']}` at ZeRO {step['stage']}:") :].split("\n\n")[1]
    assert [float(number) for number in re.findall(r"\d+\.\d", table)] == list(counts.values())
    (row,) = (row for row in RESULTS["fused_rows"] if step.items() <= row.items())
    total = counts.pop("total")
    assert row["traffic_gb"] == round(total) and 0.98 * total < sum(counts.values()) < total


def test_the_traffic_of_fused_kernels_follows_from_the_sizes():
    """In bf16, values times 2 bytes of each tensor that a kernel reads or writes, with ``selective``; docs/kernels.md
    names them. Norms outside of blocks, and numbers per row, are within the tolerance."""
    counts, config = RESULTS["fused_breakdown_gb"], RESULTS["config"]
    arch = PRESETS[config["model"]]
    patches = config["pairs_per_rank"] * ((arch.vision.image_size // arch.vision.patch_size) ** 2 + 1)
    vision, text = arch.vision.layers * patches, arch.text.layers * config["caption_tokens"]
    # Behind attention the last block has one row of each image or caption.
    vision_behind = vision - patches + config["pairs_per_rank"]
    text_behind = text - config["caption_tokens"] + config["pairs_per_rank"]
    stream = (vision + vision_behind) * arch.vision.width + (text + text_behind) * arch.text.width
    hidden = vision_behind * arch.vision.mlp_width + text_behind * 4 * arch.text.width
    for kernel, values, tensors in (
        ("quick_gelu_forward", hidden, 2),
        ("quick_gelu_backward", hidden, 4),
        ("layer_norm_forward", stream, 4),
        ("layer_norm_backward", stream, 5),
        ("split_qkv_backward", 3 * vision * arch.vision.width, 2),
    ):
        assert counts[kernel] == pytest.approx(2 * tensors * values / 1e9, rel=0.03), kernel


@pytest.mark.parametrize("config", ["vit_h14_worldwide.yaml", "vit_h14_stages.yaml"])
def test_the_config_names_the_peak_that_was_counted(config):
    text = (ROOT / "configs" / "train" / config).read_text(encoding="utf-8")
    settings = yaml.safe_load(text)["zero"]
    (row,) = (row for row in RESULTS["wire_rows"] if {"stage": row["stage"], **row["zero"]} == settings)
    assert f"recompute: {row['recompute']}  # {round(row['peak_gib'])} GiB per rank by count (docs/step.md)" in text


def test_the_table_of_recomputation_is_the_rows(counted):
    """In docs/training.md: products and peaks at ZeRO 1, 2 and 3 on 384 ranks. Those of `full` are in both tables."""
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    rows = {
        (row["recompute"], row["stage"]): row for row in RESULTS["fused_rows"] if row["kernels_of_blocks"] == "triton"
    }
    for name, label in (("none", "`none` (default)"), ("selective", "`selective`"), ("full", "`full`")):
        (line,) = (line for line in page.splitlines() if line.startswith(f"| {label} |"))
        for column, key in ((-2, "products_tflop"), (-1, "peak_gib")):
            cells = [float(cell) for cell in line.strip(" |").split(" | ")[column].split("/")]
            assert cells == [rows[name, stage][key] for stage in (1, 2, 3)], (name, key)
    for stage in (1, 2, 3):
        assert rows["selective", stage]["products"] == rows["none", stage]["products"] < rows["full", stage]["products"]
        for key in ("kernels", "traffic_gb", "peak_gib"):
            assert rows["full", stage][key] == counted["now", 384, stage][key]
        assert rows["full", stage]["peak_gib"] < rows["selective", stage]["peak_gib"] < rows["none", stage]["peak_gib"]


def test_a_step_waits_for_nothing_up_to_zero_1(counted):
    for (tree, _, stage), row in counted.items():
        if tree == "now" and stage < 3:
            assert row["stream_synchronisations"] == 0
            assert row["device_synchronisations"] == (stage == 2)
            assert row["pageable_uploads"] == row["pageable_read_backs"] == 0 and row["event_waits"] == 1


def test_the_loss_launches_as_much_on_one_gpu_as_on_hundreds(counted):
    for stage in (1, 2, 3):
        one, many = (counted["now", ranks, stage] for ranks in (1, 384))
        assert many["loss_kernels"] < 3 * one["loss_kernels"] and many["loss_point_to_point"] == 0


def test_the_token_table_costs_at_most_two_percent_of_a_dense_one(counted):
    for stage in (1, 2, 3):
        dense, sharded = (counted[tree, 384, stage] for tree in ("before", "now"))
        assert 0 < sharded["table_mb"] <= 0.02 * dense["table_mb"]
        assert sharded["table_host_kb"] < 100
        assert sharded["peak_gib"] < dense["peak_gib"] and sharded["allocated_gib"] <= dense["allocated_gib"]
    for stage in (0, 1, 2, 3):
        assert counted["now", 1, stage]["table_mb"] == counted["now", 1, stage]["table_point_to_point"] == 0


def test_the_text_tower_computes_the_captions_own_tokens(counted):
    """And in the last block, of 12 products of that size, 9 in the rows of the captions' ends alone."""
    config = RESULTS["config"]
    fraction = config["caption_tokens"] / (config["pairs_per_rank"] * config["padded_to_before"])
    fraction *= 1 - 9 / 12 / PRESETS[config["model"]].text.layers
    for (tree, ranks, stage), row in counted.items():
        if tree == "now":
            assert row["text_tflop"] == pytest.approx(fraction * counted["before", ranks, stage]["text_tflop"], abs=0.1)


def test_the_page_describes_the_batch_that_was_counted():
    page = (ROOT / "docs" / "step.md").read_text(encoding="utf-8")
    for name in ("caption_tokens", "rows_used", "rows_asked_for", "ids_of_the_captions", "padded_to_now"):
        assert re.search(rf"(?<![\d,]){RESULTS['config'][name]:,}(?![\d]|,\d)", page), name
    assert f"`{RESULTS['env']['commit']}`" in page and f"`{RESULTS['config']['commit_before']}`" in page


WIRE = ("all_reduced_gb", "reduce_scattered_gb", "gathered_gb", "sent_gb", "device_synchronisations", "peak_gib")
EXCHANGED = ("exchanged_gb", "exchanged_between_nodes_gb")
EXCHANGED_COLUMN, PER_NODE = 2, 8


def wire_section():
    return section("Gradients and weights on the wire")


def test_the_table_of_the_wire_is_the_rows():
    lines = [line.strip("| ").split(" | ") for line in wire_section().splitlines() if line.startswith("| `")]
    exchanged = [line.pop(1 + EXCHANGED_COLUMN) for line in lines][1:]
    found = {label: [[float(number) for number in cell.split(" / ")] for cell in cells] for label, *cells in lines[1:]}
    rows = [[row[key] for key in WIRE] for row in RESULTS["wire_rows"]]
    half = len(rows) // 2
    assert len(found) == half == 5
    for cells, *of_stages in zip(found.values(), rows[:half], rows[half:], strict=True):
        assert cells == [sorted(set(both), key=both.index) for both in zip(*of_stages, strict=True)]
    for row, cell in zip(RESULTS["wire_rows"], exchanged * 2, strict=True):
        within, between = (row[key] for key in EXCHANGED)
        assert cell == (f"{within} + {between}" if between else str(within))


def test_what_a_rank_sends_follows_from_the_buffers_and_the_gradients_from_the_sizes():
    """A ring sends twice a buffer that is all-reduced and once any other; the token table is not among the weights."""
    arch = PRESETS[RESULTS["config"]["model"]]
    weights = num_parameters(arch) - arch.text.vocab_size * arch.text.width
    for row in RESULTS["wire_rows"]:
        rings = 383 / 384 * (2 * row["all_reduced_gb"] + row["reduce_scattered_gb"] + row["gathered_gb"])
        within, between = (row[key] for key in EXCHANGED)
        exchanged = (1 - 1 / PER_NODE) * within + (1 - PER_NODE / 384) * between
        assert row["sent_gb"] == pytest.approx(rings + exchanged, abs=0.06)
        assert between == pytest.approx(within / PER_NODE, abs=0.006)
        size = {"bf16": 2, "fp32": 4}[row["zero"].get("reduce_dtype", "fp32")] * weights / 1e9
        of_loss = RESULTS["wire_rows"][0]["reduce_scattered_gb"]
        if row["zero"].get("reduction") == "scatter":
            gradients = row["reduce_scattered_gb"] - of_loss + within
            assert gradients == pytest.approx(size, abs=0.01) and not row["all_reduced_gb"]
        else:
            assert row["all_reduced_gb"] == pytest.approx(size, abs=0.01)
        assert row["stream_synchronisations"] == 0


GATHER = {
    "messages of weights": "messages",
    "weights in these messages, GB": "weights_gb",
    "of these, waited for when the step ends, GB": "waited_at_the_end_gb",
    "waited for when the next forward pass begins, GB": "waited_at_the_beginning_gb",
    "in flight at its first product, GB": "in_flight_gb",
    "kernels": "kernels",
    "copies on the device": "device_copies",
    "waits for a stream or the device": "synchronisations",
    "waits for the step before": "event_waits",
    "peak memory, GiB": "peak_gib",
    "peak reserved, GiB": "reserved_gib",
}


def test_the_table_of_the_hidden_gather_is_the_rows():
    table = wire_section()[wire_section().index("| messages of weights |") :].split("\n\n")[0]
    found = dict(line.strip("| ").split(" | ") for line in table.splitlines())
    assert found.keys() == GATHER.keys() and [row["stage"] for row in RESULTS["gather_rows"]] == [1, 2]
    for row in RESULTS["gather_rows"]:
        assert {label: float(cell.replace(",", "")) for label, cell in found.items()} == {
            label: row[key] for label, key in GATHER.items()
        }


def test_most_of_the_gather_is_in_flight_when_the_forward_pass_computes():
    for row in RESULTS["gather_rows"]:
        assert row["in_flight_gb"] > 0.9 * row["weights_gb"] and row["waited_at_the_end_gb"] == 0
        begun = row["waited_at_the_beginning_gb"] + row["in_flight_gb"]
        assert begun == pytest.approx(row["weights_gb"], abs=0.002)
        assert row["synchronisations"] == 0


LAST_BLOCK = ("products_tflop", "text_tflop", "kernels", "traffic_gb", "peak_gib")


def test_the_table_of_the_last_block_is_the_rows():
    rows = {(row["tree"], row["recompute"]): row for row in RESULTS["last_block_rows"]}
    lines = [line.strip("| ").split(" | ") for line in section("The last block").splitlines() if line.startswith("| ")]
    assert [line[0] for line in lines[1:]] == list(KINDS) and len(rows) == 6
    for kind, *cells in lines[1:]:
        for cell, key in zip(cells, LAST_BLOCK, strict=True):
            before, _, now = cell.replace(",", "").partition(" → ")
            assert [float(before), float(now or before)] == [rows[tree, kind][key] for tree in ("before", "now")]
    assert f"`{RESULTS['config']['commit_last_block_before']}`" in section("The last block")


def test_what_the_last_block_saves_follows_from_the_sizes():
    """Behind attention it multiplies one row of each image or caption in place of all, forward and twice backward."""
    config = RESULTS["config"]
    arch, pairs = PRESETS[config["model"]], config["pairs_per_rank"]
    vision, text = arch.vision, arch.text
    saved = 0.0
    for rows, width, mlp_width in (
        (pairs * (vision.image_size // vision.patch_size) ** 2, vision.width, vision.mlp_width),
        (config["caption_tokens"] - pairs, text.width, 4 * text.width),
    ):
        saved += 3 * 2 * rows * (width**2 + 2 * width * mlp_width) / 1e12
    rows = {(row["tree"], row["recompute"]): row for row in RESULTS["last_block_rows"]}
    for kind in ("none", "selective"):
        before, now = rows["before", kind], rows["now", kind]
        assert before["products_tflop"] - now["products_tflop"] == pytest.approx(saved, abs=0.11)
    for kind in KINDS:
        assert all(rows["now", kind][key] <= rows["before", kind][key] for key in LAST_BLOCK if key != "kernels")
