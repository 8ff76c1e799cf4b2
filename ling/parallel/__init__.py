"""Process groups and pipeline schedule: the only importer of megatron.core.parallel_state."""
