"""A file is a journey; each verb is a function `(recipe, run) -> dict` that composes the lower levels.

config.py      one frozen recipe dataclass a verb; its fields are the flags, the YAML keys and the Python keywords
checkpoint.py  import, inspect
export.py      export: stock classes, GGUF, Megatron
doctor.py      versions, kernels, device limits, what is missing
"""
