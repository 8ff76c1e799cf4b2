"""The rules between settings: the shipped tiny configs pass, and each rule refuses its case with a mend."""

from functools import partial
from pathlib import Path

import pytest

from ling.config import Config, UserError, check_config, load_config
from ling.config import derived as d
from ling.config.rules import config_warnings

RUNS = Path(__file__).parents[2] / "configs" / "runs"


def moe(*overrides: str) -> partial[Config]:
    """Loads the tiny MoE run when it is called, which keeps the collection of the tests fast."""
    return partial(load_config, RUNS / "tiny_moe.yaml", overrides)


def dense(*overrides: str) -> partial[Config]:
    return partial(load_config, RUNS / "tiny_dense.yaml", overrides)


def p(**sizes: int | str) -> list[str]:
    """Overrides of `parallel` by the usual short names."""
    names = {
        "tp": "tensor_model_parallel_size",
        "pp": "pipeline_model_parallel_size",
        "vpp": "virtual_pipeline_model_parallel_size",
        "ep": "expert_model_parallel_size",
        "etp": "expert_tensor_parallel_size",
        "cp": "context_parallel_size",
        "sp": "sequence_parallel",
    }
    return [f"parallel.{names[name]}={size}" for name, size in sizes.items()]


@pytest.mark.parametrize(
    ("config", "world"),
    [
        (moe(), None),
        (moe(), 2),
        (moe(*p(ep=1)), 1),
        (moe(*p(tp=2, sp="true")), 2),
        (moe(*p(tp=2, sp="true", ep=1, etp=2)), 2),
        (moe(*p(tp=2, sp="true", etp=2), "runtime.platform=cuda"), 4),
        (moe(*p(pp=2, vpp=2), "train.micro_batch_size=4"), 4),
        (moe(*p(pp=4)), 8),
        (dense(), 2),
        (dense(*p(tp=2)), 4),
        (dense("model.kv_channels=null", "model.hidden_size=192", "model.rotary_percent=0.25"), 1),
        (dense("optim.lr_decay_style=WSD", "optim.lr_wsd_decay_iters=380"), None),
        (dense("optim.lr_decay_style=constant", "optim.lr_warmup_iters=400"), None),
        (dense("train.rampup_batch_size=[8,8,1000]"), 1),
        (dense("train.micro_batch_size=2", "train.rampup_batch_size=[4,4,1]", *p(pp=2, vpp=2)), 2),
        (dense("data.train=[a/train, {path: b/train, weight: 2, name: b}]", "data.valid=[a/valid, b/valid]"), None),
        (dense("model.activation=gelu", "model.mcore.deallocate_pipeline_outputs=true"), None),
    ],
)
def test_what_fits_passes(config, world):
    check_config(config(), world)


WRONG = [
    # heads
    (dense("model.kv_channels=null", "model.hidden_size=130"), None, "130 is not a multiple of 4 heads"),
    (dense("model.num_query_groups=3"), None, "4 heads are not a multiple of 3 groups"),
    (dense("model.rotary_percent=0.03125"), None, "rotates 1 of them"),
    (dense("model.rotary_percent=0.01"), None, "rotates 0.32 of them"),
    # layers and experts
    (dense("model.first_k_dense_replace=5"), None, "model.first_k_dense_replace: 5 is more than num_layers (4)"),
    (moe("model.first_k_dense_replace=4"), None, "all 4 layers would be dense"),
    (dense("model.moe_ffn_hidden_size=96"), None, "model.moe_ffn_hidden_size: has no meaning without experts"),
    (dense("model.routed_activation=gelu"), None, "model.routed_activation: has no meaning without experts"),
    (moe("model.moe_ffn_hidden_size=null"), None, "model.moe_ffn_hidden_size: not given"),
    (
        moe("model.moe_router_topk=9", "model.moe_router_num_groups=null", "model.moe_router_group_topk=null"),
        None,
        "9 is more than num_moe_experts (8)",
    ),
    (moe("model.moe_router_group_topk=null"), None, "model.moe_router_group_topk: not given"),
    (moe("model.moe_router_num_groups=null"), None, "model.moe_router_num_groups: not given"),
    (moe("model.moe_router_num_groups=3"), None, "8 experts do not divide into 3 groups"),
    (moe("model.moe_router_num_groups=8"), None, "8 groups of 1 expert"),
    (moe("model.moe_router_group_topk=5"), None, "5 is more than moe_router_num_groups (4)"),
    (moe("model.moe_router_topk=5"), None, "5 experts cannot be chosen from 2 groups of 2"),
    # activations and further fields
    (dense("model.activation=powlo"), None, "model.activation: unknown activation 'powlo'"),
    (dense("model.activation.m=10"), None, "model.activation.m: must be"),
    (dense("model.activation.n=1"), None, "powlu has no parameter 'n'"),
    (dense("model.activation=null"), None, "model.activation: is null"),
    (dense("model.dense_activation={m: 2}"), None, "model.dense_activation: expected a name"),
    (dense("model.activation=5"), None, "model.activation: expected a name"),
    (moe("model.shared_activation={name: swiglu_clip, limit: [1, 2]}"), None, "2 entries for 4 layers"),
    (dense("model.mcore.num_layers=5"), None, "set model.num_layers instead"),
    (dense("model.mcore.sequence_parallel=true"), None, "set parallel.sequence_parallel instead"),
    (dense("model.mcore.gated_linear_unit=true"), None, "follows from model.activation"),
    (dense("model.mcore.recompute_granularity=full"), None, "set runtime.recompute_granularity instead"),
    (dense("model.mcore.window_size=[128,0]"), None, "would have no effect"),
    (dense("runtime.recompute_granularity=selective"), None, "needs to know of what"),
    (dense("runtime.recompute_modules=[core_attn]"), None, "runtime.recompute_granularity=selective"),
    (
        dense("runtime.recompute_granularity=selective", "runtime.recompute_modules=[moe]"),
        None,
        "the model has no experts",
    ),
    (
        dense("runtime.recompute_granularity=selective", "runtime.recompute_modules=[attention]"),
        None,
        "is none of core_attn",
    ),
    (dense("runtime.recompute_num_layers=2"), None, "is for runtime.recompute_granularity=full"),
    (dense("parallel.num_layers_per_stage=[4]"), None, "there is one stage only"),
    (
        dense("parallel.pipeline_model_parallel_size=2", "parallel.num_layers_per_stage=[1,2]"),
        None,
        "add up to model.num_layers",
    ),
    (
        dense("parallel.pipeline_model_parallel_size=2", "parallel.num_layers_per_stage=[1,1,2]"),
        None,
        "3 numbers for 2 model chunks",
    ),
    # tensor parallel
    (
        dense(*p(tp=3), "model.num_query_groups=null", "model.vocab_size=3072"),
        None,
        "model.num_attention_heads: 4 is not a multiple of",
    ),
    (dense(*p(tp=4)), None, "4 is more than the 2 key/value heads"),
    (dense(*p(tp=2), "model.ffn_hidden_size=385"), None, "model.ffn_hidden_size: 385 is not a multiple of"),
    (
        dense(*p(tp=2), "model.make_vocab_size_divisible_by=1", "model.vocab_size=4097"),
        None,
        "the padded vocabulary (4097) is not a multiple",
    ),
    (
        moe(*p(tp=2, sp="true"), "model.moe_shared_expert_intermediate_size=97"),
        None,
        "model.moe_shared_expert_intermediate_size: 97 is not a multiple",
    ),
    (dense(*p(sp="true")), None, "needs tensor_model_parallel_size > 1"),
    (dense(*p(tp=2, sp="true"), "data.sequence_length=255"), None, "data.sequence_length: 255 is not a multiple"),
    (moe(*p(tp=2)), None, "set parallel.sequence_parallel=true"),
    # experts' layout
    (moe(*p(ep=3)), None, "model.num_moe_experts: 8 is not a multiple of"),
    (dense(*p(ep=2)), None, "parallel.expert_model_parallel_size: the model has no experts"),
    (dense(*p(etp=1)), None, "parallel.expert_tensor_parallel_size: the model has no experts"),
    (moe(*p(tp=2, sp="true", ep=1, etp=1)), None, "would not sum the experts' gradients"),
    (moe(*p(tp=2, sp="true", etp=2)), None, "gloo has no uneven all_gather"),
    (moe(*p(tp=2, sp="true", etp=2), "runtime.platform=cpu"), None, "gloo has no uneven all_gather"),
    (moe(*p(tp=2, sp="true", ep=1), "model.moe_ffn_hidden_size=97"), None, "model.moe_ffn_hidden_size: 97 is not a"),
    # stages, context, overlap
    (dense(*p(pp=3)), None, "4 layers do not divide into 3 pipeline stages"),
    (dense(*p(pp=2, vpp=4)), None, "4 layers do not divide into 2 pipeline stages of 4 chunks"),
    (dense(*p(vpp=2)), None, "needs pipeline_model_parallel_size > 1"),
    (dense(*p(cp=2)), None, "context parallelism is not built and proved yet"),
    (dense("parallel.overlap_param_gather=true"), None, "needs parallel.overlap_grad_reduce"),
    (
        dense(
            *(f"parallel.{k}" for k in ("overlap_param_gather=true", "overlap_grad_reduce=true")),
            "parallel.use_distributed_optimizer=false",
        ),
        None,
        "needs parallel.use_distributed_optimizer",
    ),
    # ranks and batches
    (moe(), 1, "needs at least 2 ranks, got 1: start with --nproc 2"),
    (moe(*p(tp=2, sp="true", pp=2, ep=4)), 4, "needs at least 8 ranks, got 4: start with --nproc 8"),
    (moe(), 3, "3 ranks are not a multiple of 2"),
    (dense(), 3, "16 is not a multiple of micro_batch_size (8) x data-parallel ranks (3)"),
    (dense("train.global_batch_size=12"), None, "train.global_batch_size: 12 is not a multiple of"),
    (dense(*p(pp=2, vpp=2), "train.global_batch_size=24"), 2, "need a multiple of 2 microbatches, got 3"),
    # the ramp of the batch: 16, micro-batches of 8
    (dense("train.rampup_batch_size=[8]"), None, "expected [start, increment, samples]"),
    (dense("train.rampup_batch_size=[8,8,0]"), None, "numbers from 1 to 2147483647, got [8, 8, 0]; write null for"),
    (dense("train.rampup_batch_size=[0,8,9]"), 1, "numbers from 1 to 2147483647, got [0, 8, 9]"),
    (dense("train.rampup_batch_size=[8,-8,9]"), None, "numbers from 1 to 2147483647, got [8, -8, 9]"),
    (dense("train.rampup_batch_size=[8,8,3000000000]"), None, "numbers from 1 to 2147483647"),
    (dense("train.rampup_batch_size=[16,8,9]"), None, "start 16 is not less than train.global_batch_size (16)"),
    (dense("train.rampup_batch_size=[8,3,9]"), None, "steps of 3 from 8 do not reach train.global_batch_size (16)"),
    (
        dense("train.global_batch_size=32", "train.rampup_batch_size=[8,12,9]"),
        None,
        "increment 12 is not a multiple of train.micro_batch_size (8)",
    ),
    (
        dense("train.rampup_batch_size=[8,4,9]", "train.micro_batch_size=4"),
        2,
        "increment 4 is not a multiple of micro_batch_size (4) x data-parallel ranks (2)",
    ),
    (
        dense("train.rampup_batch_size=[8,4,9]", "train.micro_batch_size=4", *p(pp=2, vpp=2)),
        2,
        "increment 4 is not a multiple of micro_batch_size (4) x data-parallel ranks (1) x",
    ),
    # checkpoints
    (dense("checkpoint.load=''"), None, "checkpoint.load: is empty"),
    (dense("train.recovery_steps=5"), None, "train.recovery_steps: has no meaning without checkpoint.load"),
    (dense("checkpoint.max_lost_steps=100"), None, "checkpoint.max_lost_steps: has no meaning without"),
    (
        dense("checkpoint.max_lost_steps=9", "checkpoint.async_save=true", "checkpoint.save_interval=10"),
        None,
        "checkpoint.max_lost_steps: 9 steps cannot be held with checkpoint.save_interval=10",
    ),
    (dense("checkpoint.keep_every=5"), None, "checkpoint.keep_every: has no meaning while all are kept"),
    (dense("checkpoint.merge_eval_last=3", "checkpoint.keep_last=2"), None, "3 checkpoints are to be merged, but only"),
    # schedule, precision, data, run
    (dense("optim.min_lr=1"), None, "optim.min_lr: 1.0 is more than optim.lr"),
    (dense("optim.lr_warmup_iters=401"), None, "401 is more than train.train_iters"),
    (dense("optim.lr_warmup_iters=400"), None, "train.train_iters: the decay ends at step 400"),
    (dense("optim.lr_decay_iters=20"), None, "optim.lr_decay_iters: the decay ends at step 20"),
    (dense("optim.lr_decay_style=WSD"), None, "optim.lr_wsd_decay_iters: not given"),
    (dense("optim.lr_decay_style=WSD", "optim.lr_wsd_decay_iters=381"), None, "take more than the 400 steps"),
    (dense("optim.lr_wsd_decay_iters=5"), None, "has no meaning with lr_decay_style=cosine"),
    (dense("precision.recipe=fp8", "runtime.backend=torch"), None, "fp8 needs Transformer Engine's linear layers"),
    (dense("precision.recipe=fp8_emulated"), None, "fp8_emulated is not built and proved yet"),
    (dense("data.sequence_length=513"), None, "513 is more than model.max_position_embeddings (512)"),
    (dense("data.reset_attention_mask=true", "runtime.attention=flash"), None, "set runtime.attention=sdpa"),
    (dense("data.valid=null"), None, "there is nothing to evaluate on"),
    (dense("data.train={a: b}"), None, "data.train: expected a prefix or a list"),
    (dense("data.train=null"), None, "data.train: expected a prefix or a list"),
    (dense("data.train=[]"), None, "data.train: names no data"),
    (dense("data.train=[3]"), None, "data.train: a source's path is the prefix"),
    (dense("data.train=[{path: a, wieght: 2}]"), None, "unknown key 'wieght' in a source"),
    (dense("data.train=[{path: a, weight: 0}]"), None, "must be a number greater than 0, got 0"),
    (dense("data.train=[{path: a, weight: .nan}]"), None, "must be a number greater than 0, got nan"),
    (dense("data.train=[{path: a, name: 3}]"), None, "the name of a must be text"),
    (dense("data.valid=[a, a]"), None, "two sources are called 'a'"),
    (dense("run.name=a/b"), None, "run.name: 'a/b' is not a plain name"),
    (dense("run.name=''"), None, "run.name: '' is not a plain name"),
    (dense("run.name=.."), None, "is not a plain name"),
    (dense("data.tokenizer=''"), None, "data.tokenizer: is empty"),
    (dense("train.allow_change=[optim.l]"), None, "'optim.l' is no key of a config; did you mean optim.lr?"),
    (dense("run.dir=''"), None, "run.dir: is empty"),
]


@pytest.mark.parametrize(("config", "world", "expected"), WRONG, ids=[row[2][:60] for row in WRONG])
def test_what_does_not_fit_is_refused(config, world, expected):
    with pytest.raises(UserError) as caught:
        check_config(config(), world)
    assert expected in str(caught.value)
    assert "more)" not in str(caught.value), "each case breaks one rule"
    assert "\n" not in str(caught.value)


def test_several_problems_are_counted():
    with pytest.raises(UserError, match=r"num_query_groups.*\(and 2 more\)$"):
        check_config(dense("model.num_query_groups=3", "optim.min_lr=1", "precision.recipe=fp8_emulated")())


def test_a_config_made_in_python_is_checked_too():
    with pytest.raises(UserError, match=r"^model.num_layers: not given"):
        check_config(Config())
    config = dense()()
    config.model.num_attention_heads = 0
    with pytest.raises(UserError, match=r"^model.num_attention_heads: must be at least 1, got 0$"):
        check_config(config)


def test_what_is_doubtful_is_a_warning():
    assert config_warnings(moe()()) == []
    lines = config_warnings(moe("model.activation.m=0.5")())
    assert len(lines) == 1
    assert "powlu.m = 0.5" in lines[0]


def test_derived_values():
    config = moe("model.vocab_size=4097", "model.shared_activation=gelu")()
    model, parallel = config.model, config.parallel
    assert d.padded_vocab_size(model) == 4224
    assert (d.kv_channels(model), d.num_query_groups(model)) == (32, 2)
    assert d.expert_tensor_parallel_size(parallel) == 1
    assert (d.data_parallel_size(parallel, 2), d.num_microbatches(config, 2)) == (2, 1)
    assert d.activation_for(model, "shared") == {"name": "gelu"}
    assert d.activation_for(model, "routed") == {"name": "powlu", "m": 3.0}
    assert d.run_dir(config) == Path("runs/tiny_moe")
    assert d.run_dir(moe("run.dir=/tmp/x")()) == Path("/tmp/x")
    plain = Config().model
    plain.hidden_size, plain.num_attention_heads = 128, 4
    assert (d.kv_channels(plain), d.num_query_groups(plain)) == (32, 4)
    assert d.activation_for(plain, "dense") == {"name": "powlu"}


def test_data_sources():
    assert d.data_sources(None) == []
    assert d.data_sources("data/wiki") == [d.Source("data/wiki", 1.0, "wiki")]
    assert d.data_sources({"w": "data/wiki"}) == [d.Source("data/wiki", 1.0, "w")]
    mixed = d.data_sources(["a/train", {"path": "b/train", "weight": 2}, {"path": "c", "name": "see"}])
    assert mixed == [
        d.Source("a/train", 1.0, "a/train"),
        d.Source("b/train", 2.0, "b/train"),
        d.Source("c", 1.0, "see"),
    ]
