"""Causal abstraction: causal models, interchange interventions, alignment search, patching and tracing."""
