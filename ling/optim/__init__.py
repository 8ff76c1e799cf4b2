"""Optimizers, their construction through megatron-core, and learning-rate schedules as pure functions of the step."""
