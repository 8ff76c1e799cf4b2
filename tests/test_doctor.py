import argparse
import importlib
import json
import sys
import types
from typing import NamedTuple

import pytest

import ling.platform
from ling.commands import doctor
from ling.platform import megatron, optional


class Choice(NamedTuple):
    operation: str
    implementation: str
    reason: str


@pytest.fixture
def select(monkeypatch):
    """A stand-in for the selection, so that the findings do not depend on this machine."""
    module = types.ModuleType("ling.platform.select")
    module.choose = lambda runtime, platform_name: {
        "attention": Choice("core attention", "sdpa", f"part of torch on {platform_name}")
    }
    module.precision_recipe = lambda precision, platform: "fp32"
    monkeypatch.setitem(sys.modules, "ling.platform.select", module)
    monkeypatch.setattr(ling.platform, "select", module, raising=False)
    return module


def doctor_run(capsys, *arguments):
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    code = doctor.run(parser.parse_args(arguments))
    return code, capsys.readouterr().out


def test_a_machine_in_order(capsys, select):
    code, text = doctor_run(capsys)
    assert code == 0
    for part in (
        "torch ",
        "megatron-core ",
        "transformer_engine ",
        "core attention",
        "part of torch",
        "memory",
        "can run here",
    ):
        assert part in text


def test_json(capsys, select):
    code, text = doctor_run(capsys, "--json")
    report = json.loads(text)
    assert code == 0
    assert report["problems"] == []
    assert {row["name"] for row in report["optional"]} == set(optional.PACKAGES)
    assert [row["operation"] for row in report["operations"]] == ["core attention", "precision"]
    assert report["machine"]["cores"] >= 1


def without_metadata(monkeypatch, name, version=None):
    real = importlib.metadata.version

    def fake(distribution):
        if distribution != name:
            return real(distribution)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", fake)


def test_megatron_absent(capsys, monkeypatch, select):
    without_metadata(monkeypatch, "megatron-core")
    code, text = doctor_run(capsys)
    assert code == 1
    assert "1. megatron-core is not installed: pip install 'megatron-core>=0.16.1,<0.20'" in text


@pytest.mark.parametrize("version", ["0.15.3", "0.20.0", "1.0"])
def test_megatron_unsupported(capsys, monkeypatch, select, version):
    without_metadata(monkeypatch, "megatron-core", version)
    code, text = doctor_run(capsys)
    assert code == 1
    assert f"1. megatron-core {version} is not supported: pip install 'megatron-core>=0.16.1,<0.20'" in text


def test_megatron_broken(capsys, monkeypatch, select):
    def broken():
        raise FileNotFoundError("gone\nmore")

    monkeypatch.setattr(megatron, "check_version", broken)
    code, text = doctor_run(capsys)
    assert code == 1
    assert "is broken: FileNotFoundError: gone: pip install" in text


def test_every_missing_package_is_listed_at_once(capsys, monkeypatch):
    real = importlib.import_module

    def without(name, *arguments):
        if name in ("torch", "yaml"):
            raise OSError("libcudart.so.13: cannot open") if name == "torch" else ModuleNotFoundError(name)
        return real(name, *arguments)

    monkeypatch.setattr(importlib, "import_module", without)
    without_metadata(monkeypatch, "PyYAML")
    code, text = doctor_run(capsys)
    assert code == 1
    assert (
        "1. torch is broken: OSError: libcudart.so.13: cannot open: pip install 'torch>=2.10' --force-reinstall" in text
    )
    assert "2. PyYAML is not installed: pip install 'PyYAML'" in text


def test_an_old_torch(capsys, monkeypatch, select):
    monkeypatch.setattr(importlib.import_module("torch"), "__version__", "2.9.1+cpu")
    code, text = doctor_run(capsys)
    assert code == 1
    assert "torch 2.9.1+cpu is too old, torch>=2.10 is needed: pip install 'torch>=2.10'" in text


def test_a_choice_that_fails_is_a_problem(capsys, monkeypatch, select):
    def choose(runtime, platform_name):
        raise RuntimeError("nothing fits")

    monkeypatch.setattr(select, "choose", choose)
    code, text = doctor_run(capsys)
    assert code == 1
    assert "1. no implementation could be chosen: RuntimeError: nothing fits" in text


def test_what_is_asked_for_is_what_the_platform_and_the_package_ask_for():
    assert doctor.MEGATRON == megatron.REQUIREMENT
