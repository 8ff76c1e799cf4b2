"""Time of a training step from a stated model: products at an efficiency per kind, memory traffic, communication.

Each operation of a layer takes its FLOPs over the efficient rate of its kind, or its bytes over the efficient memory
bandwidth, and the times add up. The backward pass has twice the products of the forward pass (attention: 2.5 times)
and twice its traffic. docs/planning.md has the whole model and what it is worth.
"""

# t, T, R, h: as in activations.py

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ling.config.derived import kv_channels, num_microbatches, num_query_groups, padded_vocab_size
from ling.config.schema import Config
from ling.model.counts import Kind, fc1_width, is_moe_layer
from ling.plan.activations import Storage, Tokens, dropped_parts
from ling.plan.cluster import Cluster
from ling.plan.layout import Chunk, Layout, Stage
from ling.plan.memory import States

ATTENTION_BACKWARD = 2.5
"""Products of flash attention's backward pass over those of its forward pass: it computes the scores again."""
OPTIMIZER_BYTES = 30
"""Per fp32 weight and step: gradient 4, master 8, moments 16, model weight 2, read and written."""


@dataclass(frozen=True)
class Efficiency:
    """Parts of the peaks that are reached.

    gemm, grouped, attention, head: of the tensor cores' peak, for dense matrices, for those of the experts, for flash
    attention, and for the output layer. router: of the fp32 peak. fp8_gemm, fp8_grouped: of the FP8 peak with one scale
    per tensor, quantisation not counted; blockwise: what is left of them with scales per block. memory, network: of the
    bandwidths. layer_us: host time that no kernel hides, per layer and forward pass. overlap: part of data-parallel
    traffic that is hidden where `overlap_grad_reduce` or `overlap_param_gather` says so. scale: factor on all of them,
    fitted on the row that docs/planning.md names.
    """

    gemm: float = 0.75
    grouped: float = 0.60
    attention: float = 0.55
    head: float = 0.75
    router: float = 0.60
    fp8_gemm: float = 0.60
    fp8_grouped: float = 0.40
    blockwise: float = 0.75
    memory: float = 0.75
    network: float = 0.75
    layer_us: float = 100.0
    overlap: float = 0.85
    scale: float = 0.877


@dataclass(frozen=True)
class Cost:
    """Seconds of one pass over something, by kind."""

    gemm: float = 0.0
    grouped: float = 0.0
    attention: float = 0.0
    head: float = 0.0
    memory: float = 0.0
    tensor_comm: float = 0.0
    expert_comm: float = 0.0
    host: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def __mul__(self, factor: float) -> Cost:
        return Cost(*(getattr(self, name) * factor for name in self.__dataclass_fields__))

    @property
    def seconds(self) -> float:
        """The sum: kinds do not overlap."""
        return sum(getattr(self, name) for name in self.__dataclass_fields__)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step; `total` is the sum of the others.

    compute: forward and backward passes of the slowest stage, tensor- and expert-parallel traffic included, of which
    `kinds` is the breakdown. bubble: the pipeline's filling and draining. pipeline: sends between stages that nothing
    hides. data: data-parallel traffic that nothing hides. optimizer: the update.
    """

    compute: float
    bubble: float
    pipeline: float
    data: float
    optimizer: float
    kinds: Cost
    slowest_stage: int

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.compute + self.bubble + self.pipeline + self.data + self.optimizer


class Timing:
    """The time model of one config on one cluster.

    Args:
        imbalance: rows of the rank whose experts get the most, over the mean.
        deduplicate: a token is sent once to each node, and there once to each GPU, that has any of its experts (as
            DeepEP does), not once for each expert.
    """

    def __init__(
        self,
        config: Config,
        layout: Layout,
        cluster: Cluster,
        efficiency: Efficiency | None = None,
        imbalance: float = 1.0,
        storage: Storage | None = None,
        deduplicate: bool = False,
    ) -> None:
        self.config, self.layout, self.cluster = config, layout, cluster
        self.eff = efficiency or Efficiency()
        self.storage = storage or Storage.of(config)
        self.tokens = Tokens.of(config, layout, imbalance)
        self.imbalance, self.deduplicate = imbalance, deduplicate
        self.fp8 = config.precision.recipe.startswith("fp8")
        self.blockwise = self.fp8 and config.precision.fp8_recipe == "blockwise"
        # Elements of bf16 traffic that quantising one element costs: read it, write it by rows and by columns.
        self.quantise = (3.0 if self.blockwise else 2.0) if self.fp8 else 0.0
        self.layers = {moe: self._layer(moe) for moe in (False, True)}

    def _gemm(self, flops: float, *, grouped: bool = False) -> float:
        gpu, eff = self.cluster.gpu, self.eff
        if self.config.precision.recipe == "fp32":
            return flops / (gpu.peak_fp32_tflops * 1e12 * eff.gemm * eff.scale)
        peak = gpu.peak_fp8_tflops if self.fp8 else gpu.peak_bf16_tflops
        part = (eff.fp8_grouped if self.fp8 else eff.grouped) if grouped else (eff.fp8_gemm if self.fp8 else eff.gemm)
        part *= eff.blockwise if self.blockwise else 1.0
        return flops / (peak * 1e12 * part * eff.scale)

    def _traffic(self, elements: float) -> float:
        """Seconds for so many elements read or written."""
        rate = self.cluster.gpu.memory_bandwidth_gb_s * 1e9 * self.eff.memory * self.eff.scale
        return elements * self.storage.activation / rate

    def _network(self, size_bytes: float, span: int) -> float:
        return size_bytes / (self.cluster.bandwidth(span) * self.eff.network * self.eff.scale)

    def _attention(self) -> Cost:
        """Forward pass of a layer's attention block."""
        model, layout, tokens = self.config.model, self.layout, self.tokens
        h, d = model.hidden_size, kv_channels(model)
        q, k = model.num_attention_heads * d / layout.tp, num_query_groups(model) * d / layout.tp
        gemm = 2 * tokens.inside * h * (2 * q + 2 * k)
        # Causal: half of the keys on average; scores and values, two FLOPs each.
        core = 2 * 2 * tokens.inside * q * self.config.data.sequence_length / 2
        rate = self.cluster.gpu.peak_bf16_tflops * 1e12 * self.eff.attention * self.eff.scale
        # Norm and residual sum of the hidden states; norm, rotation and copies of queries and keys; fp8: quantisation.
        elements = 5 * tokens.outside * h + (6 if model.qk_layernorm else 3) * tokens.inside * (q + k)
        elements += self.quantise * tokens.inside * (h + q)
        return Cost(
            gemm=self._gemm(gemm),
            attention=core / rate,
            memory=self._traffic(elements),
            tensor_comm=self._tensor_exchange(),
        )

    def _tensor_exchange(self) -> float:
        """Gathering and scattering the hidden states around one block (as one all-reduce without SP)."""
        layout = self.layout
        if layout.tp == 1:
            return 0.0
        size = self.tokens.inside * self.config.model.hidden_size * self.storage.activation
        return 2 * self._network(size * (layout.tp - 1) / layout.tp, layout.tp)

    def _ffn(self, kind: Kind, width: int) -> Cost:
        """Forward pass of a dense FFN or of the shared experts."""
        tokens, h, tp = self.tokens, self.config.model.hidden_size, self.layout.tp
        rows = fc1_width(self.config.model, kind, width)
        elements = tokens.inside * (rows + width) / tp
        elements += self.quantise * tokens.inside * (h + width / tp)
        exchange = self._tensor_exchange()
        flops = 2 * tokens.inside * h * (rows + width) / tp
        return Cost(gemm=self._gemm(flops), memory=self._traffic(elements), tensor_comm=exchange)

    def _experts(self) -> Cost:
        """Forward pass of router, dispatch, routed experts and combination."""
        model, layout, tokens = self.config.model, self.layout, self.tokens
        experts, h, width = model.num_moe_experts or 0, model.hidden_size, model.moe_ffn_hidden_size or 0
        rows = fc1_width(model, "routed", width) / layout.etp
        flops = 2 * tokens.rows * h * (rows + width / layout.etp)
        router_rate = self.cluster.gpu.peak_fp32_tflops * 1e12 * self.eff.router * self.eff.scale
        router = 2 * tokens.outside * h * experts / router_rate
        # Router: fp32 copy of the input, some ten passes over scores and masks. Rows are permuted before sending,
        # sorted by expert on arrival, and both again on the way back; each reads and writes.
        moves = 8 if layout.ep > 1 else 4
        elements = tokens.outside * (3 * h + 20 * experts) + tokens.rows * (moves * h + rows + width / layout.etp)
        elements += self.quantise * tokens.rows * (h + width / layout.etp)
        return Cost(
            gemm=router,
            grouped=self._gemm(flops, grouped=True),
            memory=self._traffic(elements),
            expert_comm=2 * self._all_to_all(),
        )

    def _all_to_all(self) -> float:
        """Tokens to the ranks of their experts, evenly spread: within the node and between nodes at the same time."""
        layout, model, cluster = self.layout, self.config.model, self.cluster
        span, top_k = layout.ep * layout.etp, model.moe_router_topk
        if span == 1:
            return 0.0
        near = min(span, cluster.node.gpus)
        nodes = span / near
        if self.deduplicate:
            between = _distinct(nodes, top_k) * (nodes - 1) / nodes
            within = _distinct(span, top_k) * (near - 1) / near
        else:
            between, within = top_k * (nodes - 1) / nodes, top_k * (near - 1) / span
        size = self.tokens.outside * model.hidden_size * self.storage.activation * self.imbalance
        return max(self._network(size * within, near), self._network(size * between, span) if nodes > 1 else 0.0)

    def _layer(self, moe: bool) -> tuple[Cost, Cost]:
        """Forward and backward pass of one layer for one micro-batch, with what is recomputed in the backward pass."""
        model = self.config.model
        attention = self._attention()
        norm = Cost(memory=self._traffic(5 * self.tokens.outside * model.hidden_size))
        if moe and model.num_moe_experts:
            shared = model.moe_shared_expert_intermediate_size
            ffn = self._experts() + (self._ffn("shared", shared) if shared else Cost())
        else:
            ffn = self._ffn("dense", model.ffn_hidden_size)
        host = Cost(host=self.eff.layer_us * 1e-6 / self.eff.scale)
        weights = self._weights(moe)
        forward = attention + norm + ffn + host + Cost(memory=self._traffic(weights))
        backward = replace(forward * 2, attention=forward.attention * ATTENTION_BACKWARD)
        backward = replace(backward, tensor_comm=forward.tensor_comm * 1.5, expert_comm=forward.expert_comm)
        # Reading the weights is in it twice; adding to their fp32 gradients reads and writes as much as four more.
        backward += Cost(memory=self._traffic(3 * weights))
        return forward, backward + self._recomputed(forward, attention, ffn)

    def _weights(self, moe: bool) -> float:
        """Elements of a layer's matrices on this rank."""
        model, layout, h = self.config.model, self.layout, self.config.model.hidden_size
        d, heads = kv_channels(model), model.num_attention_heads
        attention = 2 * h * (heads + num_query_groups(model)) * d / layout.tp
        if not (moe and model.num_moe_experts):
            width = model.ffn_hidden_size
            return attention + h * (fc1_width(model, "dense", width) + width) / layout.tp
        width, shared = model.moe_ffn_hidden_size or 0, model.moe_shared_expert_intermediate_size or 0
        experts = model.num_moe_experts / layout.ep / layout.etp * h * (fc1_width(model, "routed", width) + width)
        return attention + experts + h * (fc1_width(model, "shared", shared) + shared) / layout.tp

    def _recomputed(self, forward: Cost, attention: Cost, ffn: Cost) -> Cost:
        runtime = self.config.runtime
        if runtime.recompute_granularity == "full":
            return forward
        dropped, extra = dropped_parts(self.config), Cost()
        if "core_attn" in dropped:
            extra += Cost(attention=attention.attention)
        if "router" in dropped or "fc1" in dropped:  # the whole FFN of a layer with experts, or of a dense one
            return extra + ffn
        if "layernorm" in dropped:
            extra += Cost(memory=self._traffic(4 * self.tokens.outside * self.config.model.hidden_size))
        if "activation" in dropped or "routed_activation" in dropped:
            extra += Cost(memory=ffn.memory * 0.2)
        return extra

    def chunk(self, chunk: Chunk) -> tuple[Cost, Cost]:
        """Forward and backward pass of a chunk for one micro-batch."""
        model = self.config.model
        kinds = [is_moe_layer(model, layer) for layer in chunk.layers]
        kinds += [is_moe_layer(model, model.num_layers - 1)] * (model.mtp_num_layers if chunk.mtp else 0)
        forward = backward = Cost()
        for moe in kinds:
            forward, backward = forward + self.layers[moe][0], backward + self.layers[moe][1]
        if chunk.head:
            passes = 1 + model.mtp_num_layers
            head = self._head() * passes
            projection = Cost(gemm=self._gemm(4 * self.tokens.inside * model.hidden_size**2 / self.layout.tp))
            head += projection * model.mtp_num_layers
            forward, backward = forward + head, backward + head * 2
        return forward, backward

    def _head(self) -> Cost:
        """One pass through the output layer and its loss: a product in the storage format, some passes over fp32."""
        model, tokens = self.config.model, self.tokens
        logits = tokens.inside * padded_vocab_size(model) / self.layout.tp
        rate = self.cluster.gpu.peak_bf16_tflops * 1e12 * self.eff.head * self.eff.scale
        return Cost(head=2 * logits * model.hidden_size / rate, memory=self._traffic(6 * logits))

    def stage(self, stage: Stage) -> tuple[Cost, Cost]:
        """Forward and backward pass of all chunks of a stage for one micro-batch."""
        passes = [self.chunk(chunk) for chunk in stage.chunks]
        forward, backward = Cost(), Cost()
        for ahead, back in passes:
            forward, backward = forward + ahead, backward + back
        return forward, backward

    def step(self, held: Sequence[States]) -> StepTime:
        """The whole step, with what each stage holds.

        The slowest stage is busy for all its micro-batches; filling and draining add one pass of every other stage,
        over the number of virtual stages.
        """
        layout, config = self.layout, self.config
        costs = [forward + backward for forward, backward in map(self.stage, layout.stages)]
        seconds = [cost.seconds for cost in costs]
        slowest = max(range(layout.pp), key=seconds.__getitem__)
        microbatches = num_microbatches(config, layout.world)
        hidden = self.tokens.outside * config.model.hidden_size * self.storage.activation
        hop = self._network(hidden, layout.world) if layout.pp > 1 else 0.0
        data, optimizer = self._data_parallel(held[slowest])
        return StepTime(
            compute=seconds[slowest] * microbatches,
            bubble=(sum(seconds) - seconds[slowest]) / layout.vpp,
            # 1F1B waits for one send each way per micro-batch; interleaved stages send ahead and hide it.
            pipeline=2 * hop * (microbatches if layout.vpp == 1 else layout.pp),
            data=data,
            optimizer=optimizer,
            kinds=costs[slowest] * microbatches,
            slowest_stage=slowest,
        )

    def _data_parallel(self, held: States) -> tuple[float, float]:
        """Traffic between data-parallel ranks that nothing hides, and the optimizer's update."""
        layout, parallel, eff = self.layout, self.config.parallel, self.eff
        distributed = parallel.use_distributed_optimizer
        # Experts that a group of ranks shares are reduced over fewer ranks: none where each rank has its own.
        experts = held.experts / held.parameters
        part = (1 - experts) * (layout.dp - 1) / layout.dp + experts * (layout.edp - 1) / layout.edp
        span = layout.tp * layout.dp
        reduce = self._network(held.gradients * part, span) * (1 if distributed else 2)
        gather = self._network(held.weights * part, span) if distributed else 0.0
        reduce *= 1 - eff.overlap * parallel.overlap_grad_reduce
        gather *= 1 - eff.overlap * parallel.overlap_param_gather
        rate = self.cluster.gpu.memory_bandwidth_gb_s * 1e9 * eff.memory * eff.scale
        return reduce + gather, held.owned * OPTIMIZER_BYTES / rate


def _distinct(places: float, draws: int) -> float:
    """Different places among so many draws, on average."""
    return places * (1 - (1 - 1 / places) ** draws)
