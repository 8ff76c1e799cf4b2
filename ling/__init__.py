"""ling: pre-training of Ling-architecture language models on megatron-core."""

__version__ = "0.1.0"
