"""The only importer of torch.distributed.

mesh.py    ranks and reductions, true for one process without any process group
fanout.py  map a function over items: in this process, in several, or on a Ray cluster (the only importer of ray)
"""
