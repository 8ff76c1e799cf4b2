"""What a run will need before it costs anything: memory, time, checkpoints, and the layouts that fit. Without torch,
but for `ling.plan.verify`, which builds the ranks it checks."""
