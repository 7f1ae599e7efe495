"""C++ for the CPU, built on first use and called through ctypes; plain PyTorch stays the truth beside it.

build.py           finds a compiler, builds the library into a cache directory, loads it
common.py          what the wrappers check before they hand over a pointer
mamba2.py          Mamba-2 between its two projections, as one autograd function
convolution.py     the causal convolution with SiLU, as one autograd function
selective_scan.py  Mamba-1's selective scan as one autograd function, and its step
attention.py       causal attention, as one autograd function
elementwise.py     RMSNorm, squared ReLU and SwiGLU as autograd functions
decode.py          the Mamba-2 step and linear maps of few rows, for inference
quantized.py       linear maps by packed weights, for inference
sampling.py        draws from logits
program.py         a whole model's next tokens in one call (program.cpp, program_*.h)
*.h, *.cpp         the kernels: vector.h (lanes), parallel.h (threads), product.h (small matrix products), scan.h and
                   scan_backward.h, selective_scan.h, convolution.h, norms.h, attention.h, sampling.h; a .cpp beside
                   each wrapper is its C interface
"""
