import subprocess
import sys

import meta_jax as mj


def test_every_public_name_is_documented():
    for name in mj.__all__:
        value = getattr(mj, name)
        if callable(value):
            assert value.__doc__, name
            # NamedTuple's own docstring is the signature, which documents nothing.
            assert not value.__doc__.startswith(f"{name}("), name


def test_all_lists_what_is_there():
    assert len(set(mj.__all__)) == len(mj.__all__)
    public = {
        name
        for name, value in vars(mj).items()
        if not name.startswith("_") and type(value).__name__ != "module"
    }
    assert public == set(mj.__all__)


def test_import_needs_only_jax_flax_and_optax():
    heavy = ("flax", "orbax", "PIL", "matplotlib", "tensorflow_datasets", "tqdm", "tensorboardX")
    code = f"import sys, meta_jax; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
