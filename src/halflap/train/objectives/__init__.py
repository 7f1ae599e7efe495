"""What a model is trained for; each has `count(batch)` and `loss(model, batch)`.

language.py      next token of text
distillation.py  a teacher's distribution over the next token, live or from disk
intermediate.py  inner states of the teacher, beside its distribution
nested.py        students that share weights, each on its rows
"""
