"""Using what was trained: inputs as they come, classifiers of somebody's own classes, exports."""

from meta_jax.serving.classifier import Classifier, adapt_classifier
from meta_jax.serving.exported import Exported, load_exported
from meta_jax.serving.inputs import InputForm, prepare

__all__ = [
    "Classifier",
    "Exported",
    "InputForm",
    "adapt_classifier",
    "load_exported",
    "prepare",
]
