"""What a published training speed is made of: its model, its layout, and the planner's view of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ling.config.schema import (
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PrecisionConfig,
    RuntimeConfig,
    TrainConfig,
)
from ling.plan.activations import Storage
from ling.plan.cluster import Cluster, Gpu, Node
from ling.plan.layout import ModelShapes, make_layout
from ling.plan.memory import StageMemory, States, fullest, memory_of, states_of
from ling.plan.timing import Efficiency, Timing

H100 = Cluster()
H800 = replace(H100, name="h800", node=Node(8, 200.0, 50.0))
H200 = replace(H100, name="h200", gpu=Gpu("H200", 139.8, 989.4, 1978.9, 66.9, 4800.0))

DENSE = ModelConfig(activation="swiglu", qk_layernorm=False, make_vocab_size_divisible_by=128, rotary_percent=1.0)
LLAMA_8B = replace(
    DENSE,
    num_layers=32,
    hidden_size=4096,
    num_attention_heads=32,
    num_query_groups=8,
    ffn_hidden_size=14336,
    vocab_size=128256,
    max_position_embeddings=8192,
)
LLAMA_70B = replace(LLAMA_8B, num_layers=80, hidden_size=8192, num_attention_heads=64, ffn_hidden_size=28672)
QWEN_30B = replace(
    DENSE,
    num_layers=48,
    hidden_size=2048,
    num_attention_heads=32,
    num_query_groups=4,
    kv_channels=128,
    ffn_hidden_size=6144,
    vocab_size=151936,
    max_position_embeddings=4096,
    qk_layernorm=True,
    num_moe_experts=128,
    first_k_dense_replace=0,
    moe_ffn_hidden_size=768,
    moe_router_topk=8,
)
QWEN_235B = replace(
    QWEN_30B, num_layers=94, hidden_size=4096, num_attention_heads=64, ffn_hidden_size=12288, moe_ffn_hidden_size=1536
)
GPT_OSS_120B = replace(
    QWEN_30B,
    num_layers=36,
    hidden_size=2880,
    num_attention_heads=64,
    num_query_groups=8,
    kv_channels=64,
    vocab_size=201088,
    qk_layernorm=False,
    ffn_hidden_size=2880,
    moe_ffn_hidden_size=2880,
    moe_router_topk=4,
)
GPT_OSS_20B = replace(GPT_OSS_120B, num_layers=24, num_moe_experts=32)
LING_MINI = replace(
    QWEN_30B,
    num_layers=20,
    num_attention_heads=16,
    ffn_hidden_size=5120,
    vocab_size=157184,
    num_moe_experts=256,
    max_position_embeddings=8192,
    first_k_dense_replace=1,
    moe_ffn_hidden_size=512,
    moe_shared_expert_intermediate_size=512,
    moe_router_num_groups=8,
    moe_router_group_topk=4,
    mtp_num_layers=1,
    moe_z_loss_coeff=3.5e-6,
    rotary_percent=0.5,
    mcore={"cross_entropy_loss_fusion": True},
)

LING_STORAGE = Storage(weight=2, matrix=1, fp8_copy=0, gradient=4, master=4, moments=2, activation=2, gemm_input=1)
"""The Ling-V2 recipe: FP8 weights transposed on demand, fp32 gradients, 8-bit moments."""


@dataclass(frozen=True)
class Row:
    """One published row: `tokens_per_s` per GPU; torch's allocated memory in GiB, at the peak and between two steps."""

    name: str
    source: str
    model: ModelConfig
    gpus: int
    sequence: int
    micro_batch: int
    global_batch: int
    tokens_per_s: float
    recipe: str = "bf16"
    fp8_recipe: str = "tensorwise"
    parallel: dict[str, Any] = field(default_factory=dict)
    runtime: dict[str, Any] = field(default_factory=dict)
    cluster: Cluster = H100
    storage: Storage | None = None
    deepep: bool = False
    memory_gib: float | None = None
    static_gib: float | None = None
    assumed: str = ""

    @property
    def config(self) -> Config:
        """The row as a config."""
        overlap = {"overlap_grad_reduce": True, "overlap_param_gather": True}
        return Config(
            model=self.model,
            parallel=ParallelConfig(**overlap, **self.parallel),
            data=DataConfig(train="none", tokenizer="none", sequence_length=self.sequence),
            optim=OptimConfig(lr=1e-4, lr_decay_style="constant"),
            precision=PrecisionConfig(recipe=self.recipe, fp8_recipe=self.fp8_recipe),
            train=TrainConfig(train_iters=1000, micro_batch_size=self.micro_batch, global_batch_size=self.global_batch),
            runtime=RuntimeConfig(**self.runtime),
        )

    @property
    def step_seconds(self) -> float:
        """The published time of a step."""
        return self.global_batch * self.sequence / (self.tokens_per_s * self.gpus)

    def predicted_seconds(self, efficiency: Efficiency | None = None) -> float:
        """The planner's time of a step."""
        return self.timing(efficiency).step(self.held).total

    def timing(self, efficiency: Efficiency | None = None) -> Timing:
        """The planner's time model of the row."""
        config = self.config
        layout = make_layout(config, self.gpus)
        return Timing(config, layout, self.cluster, efficiency, storage=self.storage, deduplicate=self.deepep)

    @property
    def held(self) -> list[States]:
        """What the planner says that the stages hold."""
        config = self.config
        layout = make_layout(config, self.gpus)
        return states_of(config, layout, ModelShapes(self.model), self.storage or Storage.of(config))

    def predicted_memory(self) -> StageMemory:
        """The planner's memory of the fullest rank."""
        config = self.config
        layout = make_layout(config, self.gpus)
        return fullest(memory_of(config, layout, self.held, self.storage or Storage.of(config)))[1]
