"""Judging a model.

documents.py   text as token ids and bytes
held_out.py    loss, perplexity and bits a byte of text, with intervals
lm_eval.py     halflap as a model of lm-evaluation-harness
local_tasks.py its tasks over local data, and where that data is
tasks/*.yaml   those tasks
bench.py       prefill and decode speed, memory and cache over a grid
memory.py      peak memory of a piece of work
"""
