"""The Ling model on megatron-core: config, layer specs, modules, initial weights, counts."""
