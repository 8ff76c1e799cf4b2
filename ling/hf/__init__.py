"""Checkpoints to Hugging Face model directories and back: names, export, import, and the check that both agree."""
