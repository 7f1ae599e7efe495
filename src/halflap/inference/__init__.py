"""Using a model: replies to many requests at once, one batch of text, and the probabilities of given text.

requests.py      what is asked of the engine and what comes back, as data
stream.py        the pieces of one request, from the engine's thread to any other
engine.py        the engine: requests from any thread, one thread that runs the model
scheduler.py     continuous batching: what is read, what decodes, what waits
turns.py         whose turn it is among those that wait
reading.py       prompts, in passes on a fixed grid
replies.py       replies while they are written, with log-probabilities
groups.py        the slots: running replies in groups of similar length
rows.py          caches of one row, in which prompts are read
parked.py        replies that wait outside the slots
memory.py        whether decode state fits
prefix_cache.py  what was read once is not read again
speculate.py     guessing tokens ahead from the text, and how far that pays
draft.py         the guesses of a smaller model
grammar.py       replies that match a schema, a regular expression or a grammar
chooser.py       the next token of rows with parameters of their own
sampling.py      from logits to the next token
detokenize.py    token by token to text, never cutting a character or missing a stop string
generate.py      prefill and decode of one batch
log_probs.py     log-probabilities of given tokens without a batch's logits
answers.py       log-probabilities of answers, those to the same question sharing its reading
"""
