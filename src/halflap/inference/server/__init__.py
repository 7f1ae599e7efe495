"""An engine behind HTTP, in the shapes that OpenAI's clients know.

config.py        limits, keys and names (no torch)
errors.py        what goes wrong, as status and error object
bodies.py        what a request may contain
bodies_chat.py   messages and tools
prompts.py       conversations and texts to token ids
tools.py         tool calls in a model's text: asked for by a grammar, parsed back in the template's format
forms.py         what a reply must match, as one grammar
asked.py         a checked body to the engine's requests
objects.py       pieces of text to choices and chunks
scores.py        log-probabilities of continuations
exchange.py      bodies in, events out, hang-ups and time limits
metrics.py       counters for Prometheus
gate.py          keys, limits and counts, whatever answers behind them
service.py       what every endpoint works with
app.py           endpoints
site.py          models, health, metrics, the document and the page
openapi.py       the document that describes them
connections.py   how many clients may be connected, and how long one may wait before it asks
run.py           listening, and stopping politely
page.html        the chat page
"""
