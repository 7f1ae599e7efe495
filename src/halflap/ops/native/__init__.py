"""C++ for the CPU, built on first use and called through ctypes; plain PyTorch stays the truth beside it.

build.py        finds a compiler, builds the library into a cache directory, loads it
mamba2.py       Mamba-2 between its two projections, as one autograd function
elementwise.py  RMSNorm, squared ReLU and SwiGLU as autograd functions
*.h, *.cpp      the kernels: vector.h (lanes), product.h (small matrix products), scan.h and scan_backward.h,
                convolution.h, norms.h; mamba2.cpp and elementwise.cpp are the C interface
"""
