"""Causal abstraction: causal models, interchange interventions, alignment search, patching, tracing, and adapters.

Open `model.py` for causal models (ready-made ones in `models`), `interchange.py`, `session.py` and `locations.py` for
interventions on a network, `alignment.py` and `training.py` for DAS, `patching.py`, `attribution.py` and `tracing.py`
for where information flows, `explain.py` for what an adapter does, `bridge.py` from an alignment to an edit. It must
not import `cli`, `runs` or `training`.

    from reftune import causal

    with causal.intervene(model, causal.swap(causal.Location("block_output", 8, -1), source_inputs)):
        output = model(**base_inputs)
"""

from reftune.causal.accuracy import InterchangeAccuracy, interchange_accuracy, random_model
from reftune.causal.actions import Subspace
from reftune.causal.aligned import Aligned
from reftune.causal.alignment import Alignment, BoundlessDas, Das, SigmoidMask
from reftune.causal.attribution import agreement, attribution_patch
from reftune.causal.bridge import from_das, set_interchange, subspace_target
from reftune.causal.counterfactuals import Counterfactual, counterfactuals, factual
from reftune.causal.explain import Explanation, explain
from reftune.causal.heat_map import HeatMap, plot_heat_map
from reftune.causal.interchange import (
    Intervention,
    Run,
    Source,
    add,
    collect,
    fill,
    intervene,
    mean,
    noise,
    put,
    read,
    run,
    swap,
    zero,
)
from reftune.causal.interchange_data import InterchangeData, encode_counterfactuals
from reftune.causal.locations import Location
from reftune.causal.model import CausalModel, Variable
from reftune.causal.patching import logit_difference, patch, patch_heads, probability
from reftune.causal.plots import plot_graph
from reftune.causal.search import SearchResult, search
from reftune.causal.sweep import sweep
from reftune.causal.tracing import Trace, trace
from reftune.causal.training import AlignOptions, align

__all__ = [
    # causal models
    "CausalModel",
    "Counterfactual",
    "Variable",
    "counterfactuals",
    "factual",
    "plot_graph",
    # interventions
    "Intervention",
    "Location",
    "Run",
    "Source",
    "Subspace",
    "add",
    "collect",
    "fill",
    "intervene",
    "mean",
    "noise",
    "put",
    "read",
    "run",
    "swap",
    "zero",
    # distributed alignment search
    "AlignOptions",
    "Aligned",
    "Alignment",
    "BoundlessDas",
    "Das",
    "InterchangeAccuracy",
    "InterchangeData",
    "SearchResult",
    "SigmoidMask",
    "align",
    "encode_counterfactuals",
    "interchange_accuracy",
    "random_model",
    "search",
    # patching, tracing, attribution
    "HeatMap",
    "Trace",
    "agreement",
    "attribution_patch",
    "logit_difference",
    "patch",
    "patch_heads",
    "plot_heat_map",
    "probability",
    "sweep",
    "trace",
    # bridge to ReFT
    "Explanation",
    "explain",
    "from_das",
    "set_interchange",
    "subspace_target",
]
