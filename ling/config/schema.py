"""Every setting of a run, as typed dataclasses: the one layer of defaults.

Names follow megatron-core where it has the setting. Each field carries its one-line description (`ling config keys`
prints them) and, where they are simple, its limits; rules that tie several fields together stand in `rules.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

MISSING = "???"  # OmegaConf's marker: the value must be given


def opt(
    default: Any,
    doc: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A config field: default, one-line description, and its own limits (`None` is always within them)."""
    limits = {"ge": ge, "gt": gt, "le": le, "lt": lt, "choices": choices}
    metadata = {"doc": doc, **{key: limit for key, limit in limits.items() if limit is not None}}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class RunConfig:
    name: str = opt("run", "name of the run; the default folder is runs/<name>")
    dir: str | None = opt(None, "the run's folder; null: runs/<name>")
    seed: int = opt(1234, "seed of the weights and of the data order", ge=0)
    plugins: list[str] = opt([], "Python files or modules to import first, such as activations of your own")


@dataclass
class ModelConfig:
    num_layers: int = opt(MISSING, "transformer layers, MTP layers not counted", ge=1)
    hidden_size: int = opt(MISSING, "width of the residual stream", ge=1)
    num_attention_heads: int = opt(MISSING, "query heads", ge=1)
    num_query_groups: int | None = opt(None, "key/value heads (GQA); null: as many as query heads", ge=1)
    kv_channels: int | None = opt(None, "size of one head; null: hidden_size / num_attention_heads", ge=2)
    ffn_hidden_size: int = opt(MISSING, "width of the dense FFN", ge=1)
    vocab_size: int = opt(MISSING, "token ids that the model must know; the tokenizer may have fewer", ge=2)
    make_vocab_size_divisible_by: int = opt(128, "the embedding is padded to a multiple of this", ge=1)
    max_position_embeddings: int = opt(4096, "longest sequence that the model is meant for, in tokens", ge=1)

    rotary_base: float = opt(10000.0, "base of the rotary position embedding (rope theta)", gt=0)
    rotary_percent: float = opt(0.5, "part of each head that is rotated (partial RoPE)", gt=0, le=1)
    qk_layernorm: bool = opt(True, "RMSNorm on every query and key head, before RoPE")
    layernorm_epsilon: float = opt(1e-6, "epsilon of every RMSNorm", gt=0)

    activation: Any = opt("powlu", "FFN activation: a name, or {name: powlu, m: 3.0}; see docs/model.md")
    dense_activation: Any = opt(None, "activation of the dense FFNs; null: model.activation")
    shared_activation: Any = opt(None, "activation of the shared experts; null: model.activation")
    routed_activation: Any = opt(None, "activation of the routed experts; null: model.activation")

    num_moe_experts: int | None = opt(None, "routed experts of a MoE layer; null: a dense model", ge=2)
    first_k_dense_replace: int = opt(1, "so many first layers are dense, the others MoE", ge=0)
    moe_ffn_hidden_size: int | None = opt(None, "width of one routed expert", ge=1)
    moe_shared_expert_intermediate_size: int | None = opt(
        None, "width of all shared experts together; null: none", ge=1
    )
    moe_router_topk: int = opt(2, "experts that each token is sent to", ge=1)
    moe_router_num_groups: int | None = opt(None, "groups of experts for group-limited routing; null: no groups", ge=1)
    moe_router_group_topk: int | None = opt(None, "groups that a token may choose from", ge=1)
    moe_router_topk_scaling_factor: float = opt(1.0, "factor on the normalised routing weights (Ling 2.0: 2.5)", gt=0)
    moe_router_enable_expert_bias: bool = opt(True, "balance the load with a bias that no gradient reaches")
    moe_router_bias_update_rate: float = opt(1e-3, "size of the bias' sign update after each step", ge=0)
    moe_router_bias_centering: str = opt(
        "update", "what is made zero-mean over the experts", choices=("none", "update", "bias")
    )
    moe_z_loss_coeff: float = opt(0.0, "router z-loss coefficient (Ling 2.0: 3.5e-6)", ge=0)
    moe_aux_loss_coeff: float = opt(0.0, "sequence-wise balance loss coefficient; 0: none", ge=0)

    mtp_num_layers: int = opt(0, "multi-token-prediction layers", ge=0, le=1)
    mtp_loss_scaling_factor: float = opt(0.1, "weight of the multi-token-prediction loss", ge=0)

    init_method_std: float = opt(0.02, "standard deviation of the initial weights", gt=0)
    output_init: str = opt(
        "plain",
        "initial std of the layers that write to the residual stream; scaled: divided by sqrt(2 num_layers)",
        choices=("plain", "scaled"),
    )
    mcore: dict[str, Any] = opt({}, "further fields of megatron-core's TransformerConfig, checked against it")


@dataclass
class ParallelConfig:
    tensor_model_parallel_size: int = opt(1, "ranks that share each matrix (TP)", ge=1)
    sequence_parallel: bool = opt(False, "split the sequence between the TP ranks outside the matrices (SP)")
    pipeline_model_parallel_size: int = opt(1, "pipeline stages (PP)", ge=1)
    virtual_pipeline_model_parallel_size: int | None = opt(None, "model chunks per stage (interleaved 1F1B)", ge=2)
    num_layers_per_stage: list[int] | None = opt(
        None, "decoder layers of each model chunk, in the order of the model (PP x VPP numbers); null: equal parts"
    )
    expert_model_parallel_size: int = opt(1, "ranks that share the experts of a layer (EP)", ge=1)
    expert_tensor_parallel_size: int | None = opt(
        None, "ranks that share each expert's matrices (ETP); null: 1 with EP > 1, else TP", ge=1
    )
    context_parallel_size: int = opt(1, "ranks that share each sequence (CP); only 1 for now", ge=1)
    use_distributed_optimizer: bool = opt(True, "split the optimizer state between the data-parallel ranks (ZeRO-1)")
    overlap_grad_reduce: bool = opt(False, "reduce gradients while the backward pass runs")
    overlap_param_gather: bool = opt(False, "gather parameters while the forward pass runs")


@dataclass
class DataConfig:
    train: Any = opt(
        MISSING, "training data: a prefix of .bin/.idx, or a list of prefixes or {path, name, weight | tokens | epochs}"
    )
    valid: Any = opt(None, "held-out data: a prefix, a list as above, or names and prefixes; evaluated one by one")
    test: Any = opt(None, "data of the last test, as data.valid; `ling eval --split test` reads it")
    split: list[float] | None = opt(
        None, "shares of each training source's documents, in their order: [train, valid] or [train, valid, test]"
    )
    tokenizer: str = opt(MISSING, "tokenizer that the data was prepared with: a folder or a SentencePiece model")
    sequence_length: int = opt(MISSING, "tokens of a training sample", ge=2)
    reset_attention_mask: bool = opt(False, "let tokens attend within their document only")
    reset_position_ids: bool = opt(False, "count positions from the start of each document, not of the sample")
    eod_mask_loss: bool = opt(False, "no loss on the token that follows an end of document")
    max_epochs: float | None = opt(None, "refuse a run that takes a source more often than this; null: no limit", gt=0)
    cache_dir: str | None = opt(
        None, "folder of large shuffles, for all runs; null: data_cache beside the run's folder"
    )
    num_workers: int = opt(0, "processes that prefetch batches; 0: none", ge=0)


@dataclass
class OptimConfig:
    lr: float = opt(MISSING, "peak learning rate", gt=0)
    min_lr: float = opt(0.0, "learning rate at the end of the decay", ge=0)
    lr_decay_style: str = opt("cosine", "schedule after the warm-up", choices=("constant", "cosine", "WSD"))
    lr_warmup_iters: int = opt(0, "steps of linear warm-up from 0", ge=0)
    lr_decay_iters: int | None = opt(None, "step at which the decay ends; null: train.train_iters", ge=1)
    lr_wsd_decay_iters: int | None = opt(None, "length of WSD's decay, in steps", ge=1)
    lr_wsd_decay_style: str = opt(
        "minus_sqrt", "shape of WSD's decay", choices=("linear", "cosine", "exponential", "minus_sqrt")
    )
    weight_decay: float = opt(0.1, "decoupled weight decay (AdamW)", ge=0)
    no_weight_decay: list[str] = opt([], "name patterns without weight decay, besides norms, biases and scalars")
    adam_beta1: float = opt(0.9, "AdamW: decay of the first moment", ge=0, lt=1)
    adam_beta2: float = opt(0.95, "AdamW: decay of the second moment", ge=0, lt=1)
    adam_eps: float = opt(1e-8, "AdamW: epsilon", gt=0)
    clip_grad: float = opt(1.0, "largest global gradient norm; 0: no clipping", ge=0)


@dataclass
class PrecisionConfig:
    recipe: str = opt(
        "bf16",
        "number format of the compute; auto: bf16 where the machine is fast at it, else fp32",
        choices=("auto", "fp32", "bf16", "fp8", "fp8_emulated"),
    )
    fp8_recipe: str = opt(
        "blockwise",
        "scales of recipe fp8: blockwise (1x128 and 128x128), tensorwise (current), or mxfp8 (Blackwell)",
        choices=("blockwise", "tensorwise", "mxfp8"),
    )
    fp8_format: str = opt("e4m3", "number format of recipe fp8; hybrid: e5m2 for gradients", choices=("e4m3", "hybrid"))
    grad_reduce_in_fp32: bool = opt(True, "accumulate and reduce gradients in fp32")


@dataclass
class TrainConfig:
    train_iters: int = opt(MISSING, "steps of the run", ge=1)
    micro_batch_size: int = opt(1, "sequences of one forward pass on one rank", ge=1)
    global_batch_size: int = opt(MISSING, "sequences of one step over all ranks", ge=1)
    rampup_batch_size: list[int] | None = opt(
        None, "grow the batch to global_batch_size: [start, increment, samples over which it grows]; null: constant"
    )
    eval_interval: int = opt(0, "evaluate every so many steps; 0: only at the end", ge=0)
    eval_iters: int = opt(8, "global batches of one evaluation, always the same ones", ge=1)
    gc_interval: int = opt(
        100, "collect Python's garbage every so many steps, on all ranks at once; 0: Python decides", ge=0
    )
    time_limit: str | None = opt(
        None, "save and stop in time for this: 23:50:00, 90m or seconds; null: the end of the SLURM job alone"
    )
    hang_timeout: float | None = opt(
        600.0, "seconds without progress after which a job ends and names the rank; null: never", gt=0
    )
    recovery_steps: int = opt(0, "first steps after checkpoint.load with a reduced learning rate", ge=0)
    recovery_lr_factor: float = opt(0.1, "learning rate of these steps, as a part of the schedule's", gt=0, le=1)
    allow_change: list[str] = opt([], "config keys that may differ from the run folder's when it is resumed")


@dataclass
class CheckpointConfig:
    save_interval: int = opt(500, "save every so many steps; 0: only at the end", ge=0)
    async_save: bool = opt(False, "write in the background, from a copy in the CPU's memory")
    max_lost_steps: int | None = opt(
        None,
        "async_save: wait for a save in the background before a crash could cost more steps than so many, "
        "save_interval or more; null: go on until the next save is due",
        ge=1,
    )
    keep_last: int | None = opt(
        None, "keep so many of the newest checkpoints and remove older ones; null: keep all", ge=1
    )
    keep_every: int | None = opt(None, "keep those at a multiple of so many steps for good", ge=1)
    verify: str = opt(
        "always",
        "look at a checkpoint's files before it is loaded or others are removed for it; always: checksums, manifest: "
        "sizes",
        choices=("always", "manifest", "never"),
    )
    load: str | None = opt(None, "begin from this checkpoint of another run (or its folder: the newest)")
    load_optimizer: bool = opt(True, "load: with the optimizer's state")
    load_step: bool = opt(True, "load: with the step and the position in the data; else from step 0")
    merge_eval_last: int | None = opt(
        None, "at each save also evaluate the merge of so many of the newest checkpoints", ge=2
    )
    merge_eval_schedule: str = opt(
        "linear", "decay that the merge stands for", choices=("linear", "cosine", "1-sqrt", "mean")
    )
    export_every: int | None = opt(
        None, "export to a Hugging Face model directory every so many steps, in the background; null: never", ge=1
    )
    export_at_end: bool = opt(False, "export the checkpoint of the last step")


@dataclass
class ObserveConfig:
    log_interval: int = opt(1, "steps between two lines on the console", ge=1)
    straggler_interval: int = opt(
        100, "steps between two comparisons of the time that ranks work; 0: never; a world of one never does", ge=0
    )
    straggler_factor: float = opt(1.15, "times the middle rank's time, from which a rank is named as slow", gt=1)
    tensorboard: bool = opt(False, "write TensorBoard files into the run's folder")
    wandb: str = opt("disabled", "Weights & Biases", choices=("disabled", "offline", "online"))
    wandb_project: str = opt("ling", "Weights & Biases project")
    peak_tflops: float | None = opt(
        None, "dense peak of one device in TFLOP/s, for MFU; null: from a table of GPUs", gt=0
    )


@dataclass
class RuntimeConfig:
    platform: str = opt("auto", "where to run", choices=("auto", "cpu", "cuda"))
    backend: str = opt(
        "auto",
        "linear layers: te: Transformer Engine's (FP8 too), torch: megatron-core's own; auto: te where it works",
        choices=("auto", "te", "torch"),
    )
    attention: str = opt("auto", "core attention; auto: sdpa", choices=("auto", "sdpa", "flash", "te"))
    grouped_gemm: str = opt(
        "auto",
        "matrix products of the experts; auto: te with backend te, else grouped_mm where torch has it",
        choices=("auto", "te", "grouped_mm", "loop"),
    )
    kernels: str = opt(
        "auto",
        "FFN activation: fused: ling's compiled kernels, reference: readable torch; auto: fused where it is built",
        choices=("auto", "fused", "reference"),
    )
    recompute_granularity: str = opt(
        "none",
        "compute activations again in the backward pass: full: of whole layers, selective: of recompute_modules",
        choices=("none", "full", "selective"),
    )
    recompute_modules: list[str] = opt(
        [], "what selective recomputes: core_attn, layernorm, activation, moe, shared_experts, mlp"
    )
    recompute_num_layers: int = opt(1, "full: layers between two kept activations", ge=1)
    num_threads: int | None = opt(None, "CPU threads of one rank; null: cores / local ranks", ge=1)


@dataclass
class LaunchConfig:
    cluster: str | None = opt(None, "cluster file; --cluster FILE of ling launch wins")
    nodes: int = opt(1, "nodes of the job; --nodes N of ling launch wins", ge=1)
    nproc_per_node: int | None = opt(None, "ranks per node; null: the GPUs of a node in the cluster file", ge=1)
    hosts: list[str] = opt([], "ling launch torchrun: hosts to reach by ssh; node01..08 stands for eight")
    container: str | None = opt(None, "image that the job runs in; null: none")
    time_limit: str | None = opt(None, "time limit of the SLURM job: 1-00:00:00, 90m; null: the cluster file's")
    stop_before: str = opt("10m", "the SLURM job saves and stops so long before its time limit")
    restart: str = opt(
        "requeue",
        "how the job goes on after an end that is not final; array: launch.array_size jobs, one after the other",
        choices=("requeue", "array", "never"),
    )
    array_size: int = opt(10, "jobs of launch.restart=array", ge=2)
    max_failures: int = opt(3, "starts in a row without a new checkpoint after which the job gives up", ge=1)


@dataclass
class Config:
    """A run: the root of the tree."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
