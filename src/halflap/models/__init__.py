"""What the network is: a list of blocks, and the list is data.

config.py     block configs and the model config, with validation and JSON
layout.py     every parameter's dimensions as runs of grids of named axes
count.py      parameters, FLOPs per token and cache bytes from the config alone
presets.py    published and small shapes
rope.py       rotary position embedding: full, partial, scaled
attention.py  grouped-query attention mixer
mamba2.py     Mamba-2 mixer
mlp.py        MLP mixer
linear.py     the linear map of every mixer
norm.py       the norms of blocks: RMSNorm, LayerNorm1P
cache.py      what a decoded sequence keeps: keys and values, convolution tails, SSM states
model.py      Block, HybridModel, initialisation
"""
