import pytest

from ling.observe.throughput import PEAK_TFLOPS, Throughput, find_peak_tflops


def test_rates_follow_their_formulas():
    rates = Throughput(flops_per_token=6e9, devices=4, peak_tflops=100.0).measure(8192, 0.5)
    assert rates["tokens_per_s"] == pytest.approx(16384)
    assert rates["tokens_per_s_per_device"] == pytest.approx(4096)
    assert rates["tflops_per_device"] == pytest.approx(24.576)
    assert rates["mfu"] == pytest.approx(0.24576)


def test_no_peak_no_mfu():
    assert Throughput(1.0, 1).measure(10, 1.0)["mfu"] is None


def test_a_step_takes_time():
    with pytest.raises(ValueError, match="0 s"):
        Throughput(1.0, 1).measure(10, 0.0)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A800-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H800", 989.4),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA H20", 148.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A10G", None),
        ("Intel(R) Xeon(R) Processor", None),
        ("", None),
    ],
)
def test_peak_by_device_name(name, peak):
    assert find_peak_tflops(name) == peak


def test_every_row_of_the_table_is_found_by_its_own_name():
    assert all(find_peak_tflops(f"NVIDIA {name}") == peak for name, peak in PEAK_TFLOPS.items())
