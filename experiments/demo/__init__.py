"""A local page to draw or upload examples of a few classes on, and to have new ones classified."""
