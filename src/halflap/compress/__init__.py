"""From a teacher to the plan of a student, as a chain of files: importance, search result, plan, certificate.

kinds.py       what can be cut of each kind of block: one row a kind
axes.py        which axes may be cut, what their sizes are called, and the config that remains after a cut
importance.py  scores of every axis, as a file
sites.py       where the activations of every axis are
watch.py       scores from activations: one pass over calibration text serves every axis, source and aggregation
taylor.py      scores from gradients
partial.py     sums of a pass, kept so that a killed one goes on
check.py       scores that cannot rank anything
metrics.py     the table of metrics, and the controls `weight_norm` and `random`
depth.py       scores of whole blocks: what their removal does to the output, all at once or one after another
streamed.py    the same scores of a model larger than memory, by one reading of its weights
ranking.py     group-aware kept indices from importance and target sizes
cost_model.py  seconds of a pass as a sum over blocks, fitted to measured times
cost_table.py  those times and fits, as a file
costs.py       what a config costs, and the budgets that limit it
grid.py        sizes to try: one an axis, or numbers of blocks of each type and one width of the MLPs
space.py       the candidates that fit the budgets
search.py      rank candidates as cut, then in rounds of short distillations; resumable
correction.py  gains and eps of norms over fewer channels
plan.py        PruningPlan: exact kept indices, validated, saved as JSON
compose.py     two plans as one
prune.py       apply a plan to a stream of tensors
elastic.py     every axis sorted once, so that any size is the first indices
slices.py      a student as a slice of weights that are being trained
candidates.py  students of one teacher that are run and never written, by one reading of its weights
masked.py      the masked teacher, which a student must equal
verify.py      certify that it does, axis by axis
controls.py    the group-blind control of experiments, which no plan can express
"""
