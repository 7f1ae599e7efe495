"""Weights in and out; on disk the Hugging Face layout and nothing else.

- `config.py`      which families there are; reading and writing a checkpoint's config (no torch)
- `family.py`      what a family is: its config in both directions and its name table (no torch)
- `names.py`       name tables, expanded for a config and checked against a file (no torch)
- `nemotron_h.py`, `llama.py`, `nemotron.py`, `hymba.py`   one family each (no torch)
- `files.py`       safetensors: lazy sharded reader, streaming sharded writer, digest
- `checkpoint.py`  `Checkpoint`, `load_model`, `save_model`, `write_checkpoint`
- `streamed.py`    a model of which one part is in memory at a time
- `passes.py`      passes of one such model, or of several made of one checkpoint, through each part together
- `shelf.py`       their streams between two blocks, on the disk or in memory
- `megatron.py`    Nemotron-4 under Megatron's and NeMo's names, fused QKV included
- `gguf_names.py`, `gguf_metadata.py`, `gguf_tokenizer.py`   what a GGUF file says of tensors, network and tokenizer,
  both ways; `gguf_import.py` and `gguf_export.py` read and write the files
- `compressed_tensors.py`  packed weights as transformers and vLLM read them
- `padding.py`     unequal blocks padded with zeros for the stock classes
- `card.py`        README.md of a checkpoint
"""
