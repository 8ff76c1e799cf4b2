"""What decides the order of the data: amounts of the sources, parts of a file, cached shuffles, and the way back."""

from __future__ import annotations

import gc
import itertools
import json
import logging
import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from ling.cli import main
from ling.config.derived import cache_dir, train_sources
from ling.config.errors import UserError
from ling.config.report import save_config
from ling.data import datasets
from ling.data.build_index import build_index
from ling.data.checks import shares
from ling.data.datasets import (
    BatchIterator,
    build_test_streams,
    build_train_stream,
    build_valid_streams,
    check_data,
)
from ling.data.index_file import read_index
from ling.data.mapping import map_file, part_of
from ling.data.samples import samples_in
from ling.data.trace import step_of_rank
from tests.dist.training import tiny_config


@pytest.fixture
def cached(config, tmp_path, monkeypatch):
    """A config whose shuffles are all cached, in tmp_path/cache."""
    monkeypatch.setattr(datasets, "CACHED_FROM", 0)
    config.data.cache_dir = str(tmp_path / "cache")
    return config


def tokens_of(config, numbers) -> np.ndarray:
    stream = build_train_stream(config)
    return np.stack([stream.sample(i)["tokens"] for i in numbers])


def test_cached_shuffles_change_nothing(config, cached, tmp_path):
    numbers = range(0, 4000, 7)  # some epochs of each source
    cached.data.cache_dir, there = None, cached.data.cache_dir
    cached.run.dir = str(tmp_path / "runs" / "one")
    assert cache_dir(cached) == tmp_path / "runs" / "data_cache"
    expected = tokens_of(cached, numbers)
    in_memory = build_train_stream(cached)
    for part in in_memory.parts:
        part.cache = None
    np.testing.assert_array_equal(np.stack([in_memory.sample(i)["tokens"] for i in numbers]), expected)
    cached.data.cache_dir = there
    np.testing.assert_array_equal(tokens_of(cached, numbers), expected)
    np.testing.assert_array_equal(tokens_of(cached, numbers), expected)
    assert {path.suffix for path in Path(there).iterdir()} == {".epoch"}


def test_sources_hold_no_files_open(cached, prefix):
    """Most systems allow a process 1,024 of them, and a blend may have thousands of sources."""
    cached.data.train = [{"path": prefix, "weight": 1.0, "name": str(number)} for number in range(40)]
    before = len(os.listdir("/proc/self/fd"))
    stream = build_train_stream(cached)
    assert {stream.origin(i).source.name for i in range(40)} == {str(number) for number in range(40)}
    assert all(part.is_cached(0) for part in stream.parts)
    assert stream.sample(0)["tokens"].shape == (32,)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_mapping_lives_as_long_as_its_views(tmp_path):
    (tmp_path / "file").write_bytes(bytes(range(8)))
    view = part_of(map_file(tmp_path / "file"), "<u2", 3, 1)
    gc.collect()
    assert view.tolist() == [0x0201, 0x0403, 0x0605]
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1
    regions = Path("/proc/self/maps").read_text().count(str(tmp_path / "file"))
    del view
    gc.collect()
    assert (regions, Path("/proc/self/maps").read_text().count(str(tmp_path / "file"))) == (1, 0)
    (tmp_path / "empty").touch()
    assert map_file(tmp_path / "empty").size == 0
    with pytest.raises(FileNotFoundError):
        map_file(tmp_path / "none")


def test_index_is_built_once_for_the_whole_run(cached, monkeypatch):
    stream = build_train_stream(cached)
    taken = build_index(stream, 3000, workers=2)
    epochs = [-(-3000 * share // part.num_samples) for share, part in zip((0.75, 0.25), stream.parts, strict=True)]
    assert taken.needed == taken.made == sum(epochs)
    assert build_index(build_train_stream(cached), 3000).made == 0
    monkeypatch.setattr("ling.data.samples.permutation", None)  # nothing is computed any more
    tokens_of(cached, range(0, 3000, 11))


def test_concurrent_ranks_make_each_file_once(cached):
    expected = tokens_of(cached, range(40))
    shutil.rmtree(cached.data.cache_dir)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        for found in pool.starmap(tokens_of, [(cached, range(40))] * 4):
            np.testing.assert_array_equal(found, expected)
    assert len(list(Path(cached.data.cache_dir).iterdir())) == 2


def test_a_cache_that_cannot_be_written_is_said(cached, tmp_path, caplog):
    expected = tokens_of(cached, range(40))
    (tmp_path / "file").touch()
    cached.data.cache_dir = str(tmp_path / "file")
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(tokens_of(cached, range(40)), expected)
    assert caplog.text.count("cannot be written (") == 1
    with pytest.raises(OSError, match="file"):
        build_index(build_train_stream(cached), 40)


def test_damaged_and_foreign_orders(cached, prefix, tmp_path):
    tokens_of(cached, range(4))
    paths = sorted(Path(cached.data.cache_dir).iterdir())
    for path in paths:
        os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(UserError, match="is damaged or no order of this data: remove it"):
        tokens_of(cached, range(4))
    for path in paths:
        path.write_bytes(b"x" * (path.stat().st_size + 1))
    with pytest.raises(UserError, match="is damaged"):
        tokens_of(cached, range(4))
    cached.run.seed += 1  # another key, other files
    tokens_of(cached, range(4))
    cached.data.sequence_length = 16
    tokens_of(cached, range(4))
    assert len(list(Path(cached.data.cache_dir).iterdir())) == 3 * len(paths)


def test_amounts_in_epochs_and_tokens(config, prefix, other_prefix, caplog):
    samples = [samples_in(read_index(path).num_tokens, 32) for path in (prefix, other_prefix)]
    config.data.train = [{"path": prefix, "epochs": 2}, {"path": other_prefix, "tokens": 32 * 100}]
    config.train.train_iters, config.train.global_batch_size = 2 * samples[0] + 100, 1
    sizes = [read_index(path).num_tokens for path in (prefix, other_prefix)]
    taken = shares(config, train_sources(config), sizes)
    assert [row.epochs for row in taken] == pytest.approx([2, 100 / samples[1]])
    stream = build_train_stream(config)
    before = stream.blend.given_before(config.train.train_iters)
    assert np.abs(before - [2 * samples[0], 100]).max() <= 1
    with caplog.at_level(logging.WARNING):
        check_data(config)
        assert not caplog.text
        config.train.train_iters *= 2
        check_data(config)
    assert "takes 2.00 times the tokens that its sources add up to" in caplog.text
    config.data.max_epochs = 3.5
    with pytest.raises(UserError, match=rf"{prefix} is too small for its weight: the run takes 4.00 epochs of it"):
        check_data(config)


def test_given_before_counts_what_was_given():
    from ling.data.blend import Blend

    blend = Blend([5.0, 3.0, 0.1])
    taken = np.zeros(3, dtype=int)
    for i in range(70_000):
        if i % 6553 == 0:
            assert Blend([5.0, 3.0, 0.1]).given_before(i).tolist() == taken.tolist()
        taken[blend.locate(i)[0]] += 1


def test_a_file_in_parts(config, prefix, other_prefix):
    config.data.valid, config.data.split = None, [8, 1, 1]
    train = build_train_stream(config)
    valid, test = build_valid_streams(config), build_test_streams(config)
    assert list(valid) == list(test) == ["train", "other"]
    for number, path in enumerate((prefix, other_prefix)):
        count = read_index(path).num_documents
        name = Path(path).name
        parts = [train.parts[number], valid[name].parts[0], test[name].parts[0]]
        bounds = [round(count * share) for share in (0, 0.8, 0.9, 1)]
        assert [(part.first, part.end) for part in parts] == list(itertools.pairwise(bounds))
        whole = np.concatenate([split_tokens(path, part.first, part.end) for part in parts])
        np.testing.assert_array_equal(whole, read_index(path).tokens)
        expected = split_tokens(path, parts[1].first, parts[1].end)
        found = np.concatenate([valid[name].sample(i)["tokens"] for i in range(valid[name].num_samples)])
        np.testing.assert_array_equal(found, expected[: len(found)])
    documents = {piece.document for i in range(2000) for piece in train.origin(i).pieces if train.origin(i).epoch == 0}
    assert max(documents) < 0.8 * 300
    config.data.split = [0.9, 0.1]
    assert build_test_streams(config) == {}
    config.train.eval_iters = 1
    check_data(config)
    config.data.split = [0.9999, 0.0001]
    with pytest.raises(UserError, match="has 0 tokens in this part of data.split"):
        check_data(config)


def split_tokens(path: str, first: int, end: int) -> np.ndarray:
    index = read_index(path)
    starts = np.concatenate([[0], np.cumsum(index.lengths)])
    return index.tokens[starts[first] : starts[end]]


def test_position_ids_restart_at_documents(config):
    config.data.reset_position_ids = True
    stream = build_train_stream(config)
    restarted = 0
    for i in range(60):
        sample = stream.sample(i)
        position = 0
        for token, found in zip(sample["tokens"], sample["position_ids"], strict=True):
            assert found == position
            position = 0 if token == 2 else position + 1
            restarted += position == 0
    assert restarted


def test_origin_says_where_tokens_come_from(config):
    stream = build_train_stream(config)
    for i in range(0, 4000, 61):
        origin, tokens = stream.origin(i), stream.sample(i)
        index = read_index(origin.source.path)
        parts = [
            split_tokens(origin.source.path, p.document, p.document + 1)[p.offset :][: p.tokens] for p in origin.pieces
        ]
        expected = np.append(tokens["tokens"], tokens["labels"][-1])
        np.testing.assert_array_equal(np.concatenate(parts), expected)
        assert all(0 <= p.document < index.num_documents for p in origin.pieces)
        assert 0 <= origin.epoch <= 4000 // 250


@pytest.mark.parametrize(("size", "parallel"), [(1, {}), (4, {}), (8, {"tensor_model_parallel_size": 2})])
def test_the_steps_of_all_ranks_are_the_iterators(config, size, parallel):
    config.parallel.tensor_model_parallel_size = parallel.get("tensor_model_parallel_size", 1)
    config.train.micro_batch_size, config.train.global_batch_size = 2, 16
    stream = build_train_stream(config)
    tp = config.parallel.tensor_model_parallel_size
    dp_size = size // tp
    for rank in range(size):
        batches = BatchIterator(stream, 2, 16, rank // tp, dp_size)
        for step in (1, 2, 3):
            found = step_of_rank(config, step, rank, size)
            assert (found.dp_rank, found.dp_size) == (rank // tp, dp_size)
            for numbers in found.micro_batches:
                expected = np.stack([stream.sample(i)["tokens"] for i in numbers])
                np.testing.assert_array_equal(next(batches)["tokens"].numpy(), expected)


def test_ranks_are_in_megatron_cores_order():
    from megatron.core.parallel_state import RankGenerator

    sizes = {"tp": 2, "ep": 1, "dp": 3, "pp": 2, "cp": 1}
    for group in RankGenerator(**sizes, order="tp-cp-ep-dp-pp").get_ranks("dp"):
        config = tiny_config(parallel={})
        config.parallel.tensor_model_parallel_size = config.parallel.pipeline_model_parallel_size = 2
        config.train.micro_batch_size, config.train.global_batch_size = 1, 6
        assert [step_of_rank(config, 1, rank, 12).dp_rank for rank in group] == [0, 1, 2]


@pytest.fixture
def run_file(config, tmp_path):
    """A config file of a whole run on the tests' data."""
    made = tiny_config()
    made.data = config.data
    made.model.vocab_size = config.model.vocab_size
    made.train.global_batch_size, made.train.micro_batch_size = 4, 2
    made.train.eval_iters = 1
    save_config(made, tmp_path / "run.yaml")
    return str(tmp_path / "run.yaml")


def test_commands(run_file, tmp_path, capsys, monkeypatch, prefix, other_prefix):
    assert main(["data", "inspect", run_file, "--json"]) == 0
    preview = json.loads(capsys.readouterr().out)
    assert [row["share"] for row in preview["train"]] == [0.75, 0.25]
    assert preview["first_samples"].count("train") == 12
    assert list(preview["valid"]) == ["held_out"]
    assert main(["data", "inspect", run_file, "train.train_iters=7"]) == 0
    assert "7 steps take 896 tokens" in capsys.readouterr().out
    assert main(["data", "index", run_file]) == 0
    assert "nothing to build" in capsys.readouterr().out
    monkeypatch.setattr(datasets, "CACHED_FROM", 0)
    index = ["data", "index", run_file, f"data.cache_dir={tmp_path}/cache", "--workers", "1"]
    for said in ("2 epochs of 2 sources built, 0 were", "0 epochs of 2 sources built, 2 were"):
        assert main(index) == 0
        assert said in capsys.readouterr().out
    assert main([*index[:3], f"data.cache_dir={run_file}", "--workers", "1"]) == 2
    assert "set data.cache_dir to another folder" in capsys.readouterr().err


def test_trace_command(run_file, tmp_path, capsys, prefix, config):
    trace = ["data", "trace", run_file, "--step", "3", "--rank", "1", "--world", "2", f"data.cache_dir={tmp_path}/c"]
    assert main([*trace, "--json", "--text"]) == 0
    (first, second) = json.loads(capsys.readouterr().out)["samples"]
    assert (first["sample"], second["sample"], first["micro_batch"]) == (10, 11, 0)
    stream = build_train_stream(config)
    expected = [piece._asdict() for piece in stream.origin(10).pieces]
    assert [piece["document"] for piece in first["documents"]] == [piece["document"] for piece in expected]
    assert sum(piece["end"] - piece["begin"] for piece in first["documents"]) == 33
    assert all(piece["text"] for piece in first["documents"])
    assert main(trace) == 0
    shown = capsys.readouterr().out
    assert "step 3, rank 1 of 2 (data-parallel rank 1 of 2): 2 of the samples 8 to 11" in shown
    assert f"document {expected[0]['document']}, tokens {expected[0]['offset']} to " in shown
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    shutil.copy(run_file, run_dir / "config.yaml")
    record = {"step": 3, "consumed_samples": 100, "global_batch_size": 8}
    (run_dir / "metrics.jsonl").write_text(json.dumps({"step": 3, "eval": {}}) + "\n" + json.dumps(record) + "\n{")
    assert main(["data", "trace", str(run_dir), "--step", "3", "--json"]) == 0
    assert [sample["sample"] for sample in json.loads(capsys.readouterr().out)["samples"]] == list(range(92, 100))
    for words, said in (("--rank 2", "ranks of 2 are 0 to 1"), ("--world 3", "do not fit this many ranks")):
        assert main([*trace, *words.split()]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("suffixes", [(".bin", ".idx"), (".bin", ".idx", ".json")], ids=["foreign", "ours"])
def test_token_ids_are_looked_at_before_a_run(config, tmp_path, prefix, suffixes):
    for suffix in suffixes:
        shutil.copy(prefix + suffix, tmp_path / f"copy{suffix}")
    config.data.train = str(tmp_path / "copy")
    check_data(config)
    tokens = np.array(read_index(prefix).tokens)
    tokens[-3] = 320
    (tmp_path / "copy.bin").write_bytes(tokens.tobytes())
    with pytest.raises(UserError, match="has the token id 320, the model knows 320"):
        check_data(config)
