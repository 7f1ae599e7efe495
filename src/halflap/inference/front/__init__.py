"""One way in for several engines: processes behind Unix sockets, and a server that shares requests out among them.

affinity.py   which replica gets a request: one that has read its beginning, unless it is much busier
replica.py    a process with an engine: started, watched, started again, stopped
tether.py     what ties a process to the life of the one that started it
relay.py      a request to a replica and its reply back, as it comes
metrics.py    the front's own numbers and those of all replicas
run.py        all of it from start to stop
vllm.py       the command line that serves a checkpoint with vLLM
"""
