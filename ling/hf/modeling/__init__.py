"""The Python files that an export ships beside its weights. They import nothing of `ling`."""
