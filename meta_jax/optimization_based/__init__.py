"""Methods that absorb a support set as new weights."""
