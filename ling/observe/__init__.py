"""What a run shows of itself: metrics, loggers, console lines, rates."""
