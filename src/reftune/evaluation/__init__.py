"""How good an adapter is: held-out loss, exact match, tasks and classes, each beside the base model.

Open `heldout.py` and `row_losses.py` for losses, `tasks.py`, `task_rows.py` and `extraction.py` for what the paper's
tasks ask and count, `task_runs.py` and `task_report.py` for running and reporting them, `options.py` and `prefill.py`
for scored options with each prompt computed once, `classification.py` for classifiers, `side_effects.py` for what a
method does besides, `judging.py` for who accepts answers, `intervals.py` for confidence, `lm_eval.py` for
lm-evaluation-harness. It must not import `cli`, `comparison` or `sweeps`.
"""
