"""How good an adapter is: held-out loss, exact match, each beside the base model."""
