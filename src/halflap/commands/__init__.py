"""A file is a journey; each verb is a function `(recipe, run) -> dict` that composes the lower levels.

config.py      one frozen recipe dataclass a verb; its fields are the flags, the YAML keys and the Python keywords
checkpoint.py  import, inspect
export.py      export: stock classes, GGUF, Megatron
compress.py    score, search, prune, verify, distill, compress; scoring.py measures importance, teaching.py trains
               students, chain.py divides into steps
elastic.py     one checkpoint of many sizes: sorted, distilled together, cut
searching.py   the methods of search, of what given.py has; puzzle.py proposes a variant for each block, shortlist.py
               distils the best candidates in rounds, sweep.py repeats it for several budgets
doctor.py      versions, kernels, device limits, what is missing
"""
