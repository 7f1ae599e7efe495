"""Using a model: one batch of text, and the probabilities of given text.

sampling.py    from logits to the next token
detokenize.py  token by token to text, never cutting a character or missing a stop string
generate.py    prefill and decode of one batch
log_probs.py   log-probabilities of given tokens without a batch's logits
answers.py     log-probabilities of answers, those to the same question sharing its reading
"""
