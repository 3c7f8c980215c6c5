"""Classes of encoded images, decoded split by split, once, all to one size and number of channels.

Folders and sets of TensorFlow Datasets find images; what is done with them is here.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from meta_jax.data import pixels
from meta_jax.data.cache import cache_key, cached, file_hash, load_cached, store_cached
from meta_jax.data.dataset import (
    ON_DEVICE,
    Split,
    Splits,
    Storage,
    lazy_splits,
    split_from_array,
)
from meta_jax.data.decoding import Decoded, Encoded, decode_images
from meta_jax.data.images import broken_image, check_image_size

_PROBES = 64  # images that are looked at before a set counts as grey


class ImageClass(NamedTuple):
    """The images of a class, before they are decoded."""

    name: str
    group: str
    images: Sequence[Encoded]


class ImagePool:
    """The images of some splits; each split is decoded when it is asked for."""

    def __init__(
        self,
        classes: Mapping[str, Sequence[ImageClass]],
        image_size: int,
        *,
        grey: bool | None = None,
        identity: Callable[[str], object] | None = None,
        check: Callable[[str], None] | None = None,
        storage: Storage = ON_DEVICE,
    ) -> None:
        """Notes what there is; nothing is decoded.

        Args:
          classes: Classes of each split.
          image_size: Side in pixels after resizing.
          grey: True for 1 channel, False for 3; if None, 1 if no image of any split has a colour.
          identity: Function that gives, for a split, a value whose `repr` changes when its images
            do; what was decoded is then kept for later runs, and read back. None keeps nothing.
          check: Function that is called with a split before it is decoded, and may refuse it.
          storage: Where the images lie; by default on the device. On the host they are mapped from
            the file in which they are kept, where there is one.
        """
        sizes = [sum(len(one.images) for one in split) for split in classes.values()]
        check_image_size(image_size, min(filter(None, sizes), default=1))
        self._classes = classes
        self._image_size = image_size
        self._grey = grey
        self._identity = functools.cache(identity) if identity else None
        self._check = check
        self._storage = storage
        self._decoded: dict[str, Decoded] = {}  # for the channels, and not yet asked for

    @functools.cached_property
    def channels(self) -> int:
        """Number of channels of all splits: 1 or 3."""
        if self._grey is not None:
            return 1 if self._grey else 3
        key = self._key(*self._classes)
        if key is None:
            return self._find_channels()
        return cached(key, lambda: np.array([self._find_channels()])).item()

    def splits(self) -> Splits:
        """The splits, each decoded when it is asked for."""
        return lazy_splits({name: functools.partial(self._split, name) for name in self._classes})

    def _split(self, split: str) -> Split:
        classes = self._classes[split]
        if self._check:
            self._check(split)
        return split_from_array(
            self._pixels(split),
            [len(one.images) for one in classes],
            class_names=[one.name for one in classes],
            groups=[one.group for one in classes],
            storage=self._storage,
        )

    def _pixels(self, split: str) -> np.ndarray:
        """The images of a split, uint8 [all, image_size, image_size, channels]."""
        channels = self.channels
        key = self._key(split, channels)
        mapped = self._storage.placement == "host"
        decoded = self._decoded.pop(split, None)
        if decoded is None and key and (kept := load_cached(key, mapped=mapped)) is not None:
            return kept
        if decoded is None:
            decoded = self._decode(split, channels)
        if decoded.broken:
            index, reason = decoded.broken[0]
            raise broken_image(self._images(split)[index].name, reason)
        if key is None:
            return decoded.pixels
        return store_cached(key, decoded.pixels, mapped=mapped)

    def _key(self, *parts: str | int) -> str | None:
        """The name under which something of some splits is kept; None where nothing is."""
        if self._identity is None:
            return None
        identities = [self._identity(part) for part in parts if isinstance(part, str)]
        return cache_key(*_decoder(), self._image_size, parts, identities)

    def _images(self, split: str) -> list[Encoded]:
        return [image for one in self._classes[split] for image in one.images]

    def _decode(self, split: str, channels: int) -> Decoded:
        return decode_images(self._images(split), self._image_size, channels)

    def _find_channels(self) -> int:
        """3 if some image has a colour, else 1; images that do not decode are passed over.

        A few images tell of most sets that they have colours. Where they show none, all are decoded
        as grey, and with the first colour found it was for nothing.
        """
        images = [image for split in self._classes for image in self._images(split)]
        spread = np.linspace(0, len(images) - 1, min(_PROBES, len(images))).astype(int)
        if any_colour((images[i] for i in spread), self._image_size):
            return 3
        for split in self._classes:
            self._decoded[split] = self._decode(split, channels=1)
            if self._decoded[split].colour:
                self._decoded.clear()
                return 3
        return 1


@functools.cache
def _decoder() -> tuple[str, str]:
    """What the pixels of an image depend on beside its file."""
    import PIL

    return PIL.__version__, file_hash(pixels.__file__)


def any_colour(images: Iterable[Encoded], image_size: int) -> bool:
    """Whether some image has a colour; images that do not decode are passed over.

    Args:
      images: Images to look at, until one has a colour.
      image_size: Side in pixels at which they are looked at.
    """
    chunks = (pixels.read_chunk([image.source], image_size, 1) for image in images)
    return any(chunk.colour for chunk in chunks)
