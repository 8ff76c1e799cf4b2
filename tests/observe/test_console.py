import math

import pytest

from ling.observe.console import banner, duration, eval_line, short_count, step_line

RECORD = {
    "step": 120,
    "loss": 4.8123,
    "mtp_loss": 5.02,
    "grad_norm": 0.71,
    "lr": 1.9e-3,
    "tokens_per_s": 20800.0,
    "tokens_per_s_per_device": 10400.0,
    "step_ms": 392.0,
}


def test_step_line():
    assert step_line(RECORD, 400) == (
        "step   120/400 | loss 4.8123 | mtp 5.02 | grad 0.71 | lr 1.9e-03 | 10.4k tok/s/device | 392 ms | ETA 1m50s"
    )


def test_flops_and_mfu_only_when_known():
    assert "MFU" not in step_line({**RECORD, "mfu": None, "tflops_per_device": None}, 400)
    line = step_line({**RECORD, "mfu": 0.4213, "tflops_per_device": 416.7}, 400)
    assert "| 417 TFLOP/s | MFU 42.1% |" in line


@pytest.mark.parametrize("key", [*RECORD, None])
def test_whatever_is_missing_is_left_out(key):
    assert step_line({k: v for k, v in RECORD.items() if k != key}, 400).startswith("step ")
    assert step_line({} if key is None else {**RECORD, key: None}, None).startswith("step ")
    assert step_line({} if key is None else {**RECORD, key: "nan"}, 400).startswith("step ")


def test_a_non_finite_loss_is_shown():
    line = step_line({**RECORD, "loss": math.nan, "grad_norm": math.inf, "step_ms": math.nan}, 400)
    assert "loss nan | " in line
    assert "grad inf" in line
    assert "ETA ?" in line


def test_no_eta_at_the_end():
    assert "ETA" not in step_line({**RECORD, "step": 400}, 400)
    assert "tok/s |" in step_line({k: v for k, v in RECORD.items() if k != "tokens_per_s_per_device"}, 400)


def test_eval_line():
    record = {"step": 200, "eval": {"plays": 3.0, "broken": math.nan, "huge": 1e9}}
    assert eval_line(record) == "eval at step 200 | plays 3.0000 (perplexity 20.09) | broken nan | huge 1000000000.0000"
    assert eval_line({}) == "eval at step ?"
    assert eval_line({"eval": None}) == "eval at step ?"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.6, "1m00s"),
        (112, "1m52s"),
        (3600 * 3 + 240, "3h04m"),
        (86400 * 2 + 3600 * 5, "2d05h"),
        (-1, "0s"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (0.5, "0.5"),
        (999, "999"),
        (999.9, "1.00k"),
        (10_400, "10.4k"),
        (104_000, "104k"),
        (999_950, "1.00M"),
        (1.4e9, "1.40B"),
        (1.24e11, "124B"),
        (2.5e13, "25.0T"),
        (math.inf, "inf"),
    ],
)
def test_short_count(number, text):
    assert short_count(number) == text


def test_banner_shows_all_that_it_is_given():
    text = banner(
        name="tiny_moe",
        parameters={"total": 8_126_464, "activated": 3_000_000},
        layout={"TP": 1, "EP": 2, "DP": 2},
        devices="2 x cpu",
        precision="bf16",
        choices=[("attention", "sdpa", "part of torch"), ("norm", "torch", "no TE")],
        changes=["optim.lr = 0.002"],
        notes=["apex hidden"],
    )
    assert text.splitlines()[0] == "ling: tiny_moe"
    for part in (
        "parameters  8.13M total, 3.00M activated",
        "TP=1 EP=2 DP=2",
        "2 x cpu",
        "bf16",
        "attention  sdpa   part of torch",
        "norm       torch  no TE",
        "optim.lr = 0.002",
        "apex hidden",
    ):
        assert part in text


def test_banner_without_the_rest():
    text = banner(name="x", parameters={}, layout={}, devices="cpu", precision="fp32")
    assert text == "ling: x\n  devices     cpu\n  precision   fp32"
