"""Methods that absorb a support set as embeddings."""
