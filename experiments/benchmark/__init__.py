"""How fast whole training steps are, beside the same steps in other libraries."""
