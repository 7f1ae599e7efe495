"""Run directories to one self-contained HTML page: only files in, one file out, no torch.

artifacts.py   what a run directory holds, as facts that remember their file and JSON pointer
arms.py        the table of arms (arms.json): its dataclass, its writer, its Markdown form
shapes.py      teacher and student block by block, from config and pruning plan
judgements.py  headline, candidates, speed, lineage, loss curves: facts picked out of the artifacts
importance.py  importance.safetensors as rows of numbers ready to draw
study.py       a study: steps between arms, recall, loss over seeds, speed against cache
tasks.py       tasks and probes of scores.json
units.py       numbers as people read them
svg.py         scales, ticks and elements
plots.py       the figures with axes, strips.py those that stretch
page.py        build(runs, out): the sections, the template, the file
"""
