"""From text to batches.

config.py     the recipe section that names text, blend and row length (no torch)
text.py       files and folders of text to documents; what is held out
tokenizer.py  tokenizer.json: load, save, train; special tokens and digest
chat.py       chat templates
sandbox.py    chat templates in a process of their own, with bounds
distinct.py   each kept document once, with a count of those left out
shards.py     one file of token ids
corpus.py     documents to memory-mapped token shards with a manifest
packing.py    rows cut from a stream of documents, with segment numbers
order.py      which row comes when: shuffling and blending as pure functions
loader.py     batches as a pure function of seed and index, for every rank
batch.py      what a training step receives
"""
