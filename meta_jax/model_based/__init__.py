"""Methods that absorb a support set as the contents of a memory."""
