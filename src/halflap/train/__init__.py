"""Training: one loop, and a method is an objective.

config.py          settings of a fit: batch, learning rate, schedule, how often to save and judge; no torch
fit.py             the loop: accumulation with exact counts, clipping, saving, judging, interruption; several at once
phases.py          training in phases: tokens, blend, learning rate and batch of each; no torch
optim.py           parameter groups, AdamW, learning-rate schedules as functions of tokens
resume.py          the state of an interrupted fit on disk
interrupts.py      Ctrl-C and SIGTERM as a request
losses.py          LossTerms: a sum, and metrics as (sum, count); the mean over held-out batches
numerics.py        precision, the culprit of a loss that is not finite, memory
teacher_logits.py  a teacher's best k log-probabilities, stored and read by batch
objectives/        next token, distillation, agreement with a teacher
"""
