"""What the network is: a list of blocks, and the list is data.

config.py     block configs and the model config, with validation and JSON
layout.py     every parameter's dimensions as runs of grids of named axes
count.py      parameters, FLOPs per token and cache bytes from the config alone
utilization.py  operations a second of training against a device's peak (MFU)
presets.py    published and small shapes
sharing.py    which attention blocks are global, and whose keys and values the others read
rope.py       rotary position embedding: full, partial, scaled, stretched
attention.py  grouped-query attention mixer
mamba1.py     Mamba-1 mixer
mamba2.py     Mamba-2 mixer
hybrid.py     attention and SSM heads side by side
meta.py       meta tokens before each document
context.py    what a pass knows about its tokens
mlp.py        MLP mixer
linear.py     the linear map of every mixer
quantization.py  which rows of which matrices are packed to few bits, and how
quantized.py  linear maps and embeddings of packed weights
norm.py       the norms of blocks: RMSNorm, LayerNorm1P
cache.py      what a decoded sequence keeps: keys and values, convolution tails, SSM states
slots.py      a cache whose rows come and go
streams.py    passes between two blocks, many carried through one block before the next is read
model.py      Block, HybridModel, initialisation
decoder.py    short passes, by one native call each
compiled.py   that call, written down from a model's blocks
graphs.py     the same on a GPU, by CUDA graphs
"""
