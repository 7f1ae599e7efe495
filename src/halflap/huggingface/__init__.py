"""Our models as transformers, TRL and PEFT know models; `import halflap.hf` hands these classes to the Auto classes.

configuration.py  HalflapConfig: a ModelConfig behind the fields that transformers reads and writes
rows.py           attention masks, positions and packing to what the network takes, and its outputs back
cache.py          HalflapCache: our Cache behind the protocol of transformers' generate()
files.py          directories of ours to modules, and back
model.py          HalflapModel and HalflapForCausalLM
"""
