"""The inner loops as plain functions on tensors; no modules, no files.

ssd.py              Mamba-2: the recurrence (reference), the chunked form (fast), steps from a state
selective_scan.py   Mamba-1: the recurrence (reference), the chunked form (fast), steps from a state
conv.py             depthwise causal convolution over a sequence or from a state, and with SiLU
attention.py        causal grouped-query attention: full, packed, cached
norm.py             RMSNorm, LayerNorm1P and the gated grouped RMSNorm of Mamba-2
activation.py       squared ReLU and SwiGLU
mamba2.py           Mamba-2 between its two projections, over a sequence and one token at a time
quantized.py        rounding weights to few bits, packing them, and the linear map by them
operands.py         dtypes and shapes that kernels take, whatever they are written in
select.py           which implementation of an op runs: plain PyTorch, the kernels of native/ or those of triton_*.py
native/             the same functions in C++ for the CPU
triton_common.py    the same functions in Triton for a GPU: what its kernels share,
triton_mamba2.py    Mamba-2 between its projections: one token in two kernels, and a sequence, of which
triton_ssd.py       the scan is four kernels and
triton_conv.py      the convolution with SiLU one,
triton_selective_scan.py  Mamba-1's step, and
triton_quantized.py linear maps by packed weights
vocabulary_loss.py  cross-entropy and KL divergence that never hold a batch's logits

Legend: B batch, T time, D hidden, H heads, K key/value heads, G state groups, P head channels,
N state size, F MLP channels, V vocabulary, W convolution width, C chunk length.
"""
