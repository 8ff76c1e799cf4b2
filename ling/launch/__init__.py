"""Job files from one template per launcher, what happens when a job ends, checks before it starts, and its status."""
