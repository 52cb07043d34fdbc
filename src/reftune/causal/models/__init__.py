"""Ready-made causal models, each with the sampler that its task wants and the text that its inputs stand for."""

from reftune.causal.models.addition import addition
from reftune.causal.models.equality import hierarchical_equality
from reftune.causal.models.indirect_object import indirect_object
from reftune.causal.models.natural_logic import natural_logic
from reftune.causal.models.prices import price_tagging

__all__ = ["addition", "hierarchical_equality", "indirect_object", "natural_logic", "price_tagging"]
