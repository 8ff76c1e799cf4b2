"""The order of the data: each epoch once, the same on every layout, with workers, after a resume and at any length."""

from __future__ import annotations

import itertools
import logging
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from ling.config.derived import Source
from ling.config.errors import UserError
from ling.data.blend import BLOCK, Blend
from ling.data.datasets import (
    BatchIterator,
    SampleStream,
    build_train_stream,
    build_valid_streams,
    check_data,
    eval_batches,
)
from ling.data.index_file import read_index
from ling.data.samples import SourceSamples, permutation

S = 32


def stream_of(*prefixes, seed=1, weights=(1.0, 1.0, 1.0), **options) -> SampleStream:
    sources = [Source(path, weight, path) for path, weight in zip(prefixes, weights, strict=False)]
    return SampleStream(sources, 2, S, seed, **options)


def test_an_epoch_has_each_document_once_and_its_samples_follow_on(prefix):
    index = read_index(prefix)
    part = SourceSamples(index, S, seed=3, number=0, shuffle=True)
    documents = np.split(index.tokens, np.cumsum(index.lengths)[:-1])
    for number in (0, 1):
        epoch = part.epoch(number)
        assert sorted(epoch.documents) == list(range(300))
        run = np.concatenate([documents[i] for i in epoch.documents])
        assert sorted(epoch.samples) == list(range(part.num_samples))
        for within, place in enumerate(epoch.samples):
            sample = part.tokens(number * part.num_samples + within)
            np.testing.assert_array_equal(sample, run[place * S : place * S + S + 1])
        assert 0 < len(run) - part.num_samples * S <= S
    assert part.epoch(0).documents.tolist() != part.epoch(1).documents.tolist()
    assert part.epoch(0).samples.tolist() != part.epoch(1).samples.tolist()


def test_unshuffled_is_the_order_of_the_file(prefix):
    stream = stream_of(prefix, shuffle=False, repeat=False)
    tokens = np.concatenate([stream.sample(i)["tokens"] for i in range(stream.num_samples)])
    np.testing.assert_array_equal(tokens, read_index(prefix).tokens[: len(tokens)])
    with pytest.raises(IndexError):
        stream.sample(stream.num_samples)
    with pytest.raises(IndexError):
        stream.sample(-1)


def test_a_sample_is_a_pure_function_of_its_number(prefix, other_prefix):
    forward, backward = stream_of(prefix, other_prefix), stream_of(prefix, other_prefix)
    numbers = list(range(0, 3000, 37))
    ahead = {i: forward.sample(i)["tokens"] for i in numbers}
    for i in reversed(numbers):
        np.testing.assert_array_equal(backward.sample(i)["tokens"], ahead[i])
    other_seed = stream_of(prefix, other_prefix, seed=2)
    assert any((other_seed.sample(i)["tokens"] != ahead[i]).any() for i in numbers[:5])


def test_permutation_is_fixed_for_good():
    assert permutation(8, 1, 2, 3).tolist() == PERMUTATION
    assert sorted(permutation(1000, 1)) == list(range(1000))


PERMUTATION = [1, 2, 4, 6, 5, 0, 7, 3]


def test_labels_positions_and_masks(prefix):
    plain = stream_of(prefix)
    full = stream_of(prefix, reset_attention_mask=True, eod_mask_loss=True)
    seen_end_in_front = False
    for i in range(60):
        sample, masked = plain.sample(i), full.sample(i)
        assert {key: value.dtype.name for key, value in masked.items()} == {
            "tokens": "int64",
            "labels": "int64",
            "loss_mask": "float32",
            "position_ids": "int64",
            "document_ids": "int64",
        }
        assert "document_ids" not in sample
        np.testing.assert_array_equal(sample["tokens"][1:], sample["labels"][:-1])
        assert sample["position_ids"].tolist() == list(range(S))
        assert sample["loss_mask"].tolist() == [1.0] * S
        document = 0
        for t, token in enumerate(masked["tokens"]):
            assert (masked["position_ids"][t], masked["document_ids"][t]) == (t, document)
            assert masked["loss_mask"][t] == (token != 2)
            if token == 2:
                document += 1
                seen_end_in_front = True
    assert seen_end_in_front


def test_blend_keeps_its_shares_everywhere():
    weights = [5.0, 3.0, 1.0, 0.9999, 1e-4]
    blend = Blend(weights)
    taken = np.zeros(5, dtype=int)
    for i in range(3 * BLOCK):
        source, local = blend.locate(i)
        assert local == taken[source]  # every source in order, none left out
        taken[source] += 1
        if i % 997 == 0 or i > 3 * BLOCK - 5:
            assert np.abs(taken - blend.weights * (i + 1)).max() < 2.5


def test_blend_needs_no_history():
    one, two = Blend([1.0, 2.0, 4.0]), Blend([0.5, 1.0, 2.0])
    far = 10**11
    there = [one.locate(i) for i in range(far, far + 50)]
    one.locate(0)
    assert [two.locate(i) for i in reversed(range(far, far + 50))] == there[::-1]
    many = Blend([1.0] * 1000)
    assert sorted(many.locate(i)[0] for i in range(5000, 6000)) == list(range(1000))


def read(stream, dp_size, consumed=0, steps=4, micro=2, batch=8, **options) -> list[torch.Tensor]:
    """The global batches of some steps, put together from all ranks in Megatron's order: [batch, S] each."""
    ranks = [BatchIterator(stream, micro, batch, r, dp_size, consumed, **options) for r in range(dp_size)]
    batches = []
    for _ in range(steps):
        parts = [next(rank)["tokens"] for _ in range(batch // (micro * dp_size)) for rank in ranks]
        batches.append(torch.cat(parts))
    assert {rank.consumed_samples for rank in ranks} == {consumed + steps * batch}
    for rank in ranks:
        rank.close()
    return batches


def test_order_is_the_same_on_every_layout_with_workers_and_after_resume(prefix, other_prefix):
    stream = stream_of(prefix, other_prefix)
    expected = torch.stack([torch.from_numpy(stream.sample(i)["tokens"]) for i in range(64)]).split(8)
    for dp_size in (1, 2, 4):
        assert all(map(torch.equal, read(stream, dp_size, steps=8), expected))
    assert all(map(torch.equal, read(stream, 1, steps=8, num_workers=2), expected))
    assert all(map(torch.equal, read(stream, 2, consumed=24, steps=5, num_workers=1), expected[3:]))
    for step in range(8):
        assert torch.equal(read(stream, 2, consumed=8 * step, steps=1)[0], expected[step])
    assert torch.equal(torch.cat(read(stream, 1, batch=16, micro=4, steps=4)), torch.cat(expected))


def test_batches_are_stacked_and_leave_the_random_state_alone(prefix):
    stream = stream_of(prefix, reset_attention_mask=True)
    before = torch.random.get_rng_state()
    with_workers = BatchIterator(stream, 2, 4, 0, 1, num_workers=1)
    batch = next(with_workers)
    with_workers.close()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert {tuple(value.shape) for value in batch.values()} == {(2, S)}
    assert batch["loss_mask"].dtype == torch.float32
    assert batch["document_ids"].dtype == torch.int64


def test_streams_travel_by_name(prefix):
    stream = stream_of(prefix)
    sent = pickle.dumps(stream)
    assert len(sent) < 5000
    np.testing.assert_array_equal(pickle.loads(sent).sample(7)["tokens"], stream.sample(7)["tokens"])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_held_out_data_ends(config, num_workers):
    config.data.valid = [config.data.valid["held_out"]]
    ((name, stream),) = build_valid_streams(config).items()
    assert name == "other"
    whole = stream.num_samples // 4
    config.train.eval_iters = whole + 5
    assert eval_batches(stream, config) == whole
    config.train.eval_iters = 2
    assert eval_batches(stream, config) == 2
    batches = list(itertools.islice(BatchIterator(stream, 2, 4, 1, 2, num_workers=num_workers), whole + 1))
    assert len(batches) == whole


def test_train_stream_of_a_config(config, prefix, other_prefix):
    stream = build_train_stream(config)
    same = stream_of(prefix, other_prefix, weights=(3.0, 1.0), seed=config.run.seed)
    for i in range(20):
        np.testing.assert_array_equal(stream.sample(i)["tokens"], same.sample(i)["tokens"])
    check_data(config)


def test_the_horizon_does_not_matter(config):
    config.train.train_iters = 10
    short = [build_train_stream(config).sample(i)["tokens"] for i in range(10)]
    config.train.train_iters = 10**9
    assert all(map(np.array_equal, short, [build_train_stream(config).sample(i)["tokens"] for i in range(10)]))


def test_checks_before_the_first_step(config, prefix, other_prefix, tmp_path, tokenizer, caplog):
    def refused(said, **changes):
        saved = {}
        for key, value in changes.items():
            branch, name = key.split("__")
            saved[key] = getattr(getattr(config, branch), name)
            setattr(getattr(config, branch), name, value)
        with pytest.raises(UserError, match=said) as raised:
            check_data(config)
        assert "\n" not in str(raised.value)
        for key, value in saved.items():
            branch, name = key.split("__")
            setattr(getattr(config, branch), name, value)

    refused("set model.vocab_size to 320 or more", model__vocab_size=319)
    refused("no such file or folder", data__tokenizer=str(tmp_path / "none"))
    refused("none.idx is missing", data__train=str(tmp_path / "none"))
    refused("none.idx is missing", data__valid=[other_prefix, str(tmp_path / "none")])
    refused("too few for one sample", data__sequence_length=10**6)
    refused("less than one global batch", train__global_batch_size=10**4)
    refused("names no data", data__train=[])
    config.train.eval_iters = 10**4
    with caplog.at_level(logging.WARNING):
        check_data(config)
    assert "of the 10000 batches of train.eval_iters" in caplog.text


def test_foreign_tokenizer_is_refused(config, jsonl, tmp_path):
    from ling.data.tokenizer import train_sentencepiece

    train_sentencepiece([jsonl], 310, tmp_path / "other")
    config.data.tokenizer = str(tmp_path / "other")
    with pytest.raises(UserError, match="prepared with another tokenizer"):
        check_data(config)


def test_ids_beyond_the_model_and_uneven_batches(prefix):
    with pytest.raises(UserError, match=r"the model knows 10: raise model.vocab_size"):
        stream_of(prefix, vocab_size=10).sample(0)
    with pytest.raises(UserError, match="no multiple"):
        BatchIterator(stream_of(prefix), 2, 6, 0, 2)


def test_checks_need_no_torch():
    code = "import sys; import ling.data.datasets; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
