"""A run as a job: signals, time limits, a watchdog, the lease on the run's folder, and how each attempt ended."""
