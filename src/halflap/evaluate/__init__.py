"""Judging a model.

documents.py      text as token ids and bytes
held_out.py       loss, perplexity and bits a byte of text, with intervals
lm_eval.py        halflap as a model of lm-evaluation-harness
local_tasks.py    its tasks over local data, and where that data is
tasks/*.yaml      those tasks
probes.py         recall tasks: the table, and their rows as batches
probe_ids.py      those tasks as token ids
probe_texts.py    and as text
probe_words.py    the words of those texts
probe_prompts.py  texts as prompts of an exact length
recall.py         asking them: accuracy by length and depth
sensitivity.py    what packing each part to few bits costs, alone
bench.py          prefill and decode speed, memory and cache over a grid
block_times.py    seconds of every kind of block, for a cost table
memory.py         peak memory of a piece of work
"""
