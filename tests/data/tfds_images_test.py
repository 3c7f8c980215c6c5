import io
import json
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from meta_jax.data import image_pool
from meta_jax.data.dataset import DataError, class_examples
from meta_jax.data.source import EpisodeSize, load_source
from meta_jax.data.tfds_images import load_tfds_images
from meta_jax.lookup import UsageError

_NAMES = ["ant", "bee", "cat", "dog"]


def _png(value, mode="L", size=(6, 4)):
    file = io.BytesIO()
    Image.new(mode, size, value).save(file, "PNG")
    return file.getvalue()


def _prepare(folder, splits, features=None):
    """Prepares a set called 'toy', without TensorFlow; `splits` are lists of records."""
    features = tfds.features.FeaturesDict(
        features
        or {
            "image": tfds.features.Image(encoding_format="png"),
            "label": tfds.features.ClassLabel(names=_NAMES),
        }
    )
    folder.mkdir(parents=True)
    features.save_config(folder)
    serializer = ExampleSerializer(features.get_serialized_info())
    for split, records in splits.items():
        path = folder / f"toy-{split}.array_record-00000-of-00001"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for record in records:
            writer.write(serializer.serialize_example(record))
        writer.close()
    info = {
        "name": "toy",
        "version": folder.name,
        "fileFormat": "array_record",
        "splits": [
            {
                "name": split,
                "shardLengths": [str(len(records))],
                "numBytes": "1",
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
            for split, records in splits.items()
        ],
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))


def _records(n_classes=4, **png):
    """Class c has c + 1 images, image j of value 20 c + j."""
    return [
        {"image": _png(20 * c + j, **png), "label": c}
        for c in range(n_classes)
        for j in range(c + 1)
    ]


@pytest.fixture
def toy(tmp_path):
    _prepare(tmp_path / "toy" / "1.0.0", {"train": _records()})
    return tmp_path


def _values_by_class(splits):
    """The first pixel of every real image, by class."""
    return {
        name: np.asarray(class_examples(dataset, row)[:, 0, 0]).tolist()
        for split, dataset in splits.datasets.items()
        for row, name in enumerate(splits.class_names[split])
    }


_EXPECTED = {name: [[20 * c + j] for j in range(c + 1)] for c, name in enumerate(_NAMES)}


def test_classes_are_named_and_split(toy):
    splits = load_tfds_images("toy", data_dir=toy, image_size=5, seed=1)
    assert _values_by_class(splits) == _EXPECTED
    assert sorted(splits.datasets) == ["test", "train", "val"]
    for dataset in splits.datasets.values():
        assert dataset.examples.shape[1:] == (5, 5, 1)
    again = load_tfds_images("toy", data_dir=toy, seed=1).class_names
    assert dict(splits.class_names) == dict(again)
    tests = {load_tfds_images("toy", data_dir=toy, seed=s).class_names["test"] for s in range(8)}
    assert len(tests) > 1


def test_the_source_passes_the_name_and_settings(toy):
    source = load_source("tfds:toy", data_dir=toy, image_size=5, split_seed=1)
    assert source.config == {
        "name": "tfds:toy",
        "data_dir": str(toy),
        "image_size": 5,
        "rotations": "none",
        "augment": "none",
        "polarity": "as_is",
        "objective": "cross_entropy",
        "class_split": None,
        "split_seed": 1,
        "split_fractions": None,
        "cache": True,
        "placement": "device",
        "device_memory": None,
    }
    assert source.preprocessing["channels"] == 1
    expected = load_tfds_images("toy", data_dir=toy, image_size=5, seed=1)
    split = max(source.splits, key=lambda name: expected.datasets[name].largest)
    data = source.tasks(split, EpisodeSize(1, 1, 1), train=True).data
    np.testing.assert_array_equal(data.examples, expected.datasets[split].examples)


def test_a_list_of_classes_divides_the_set(toy):
    lists = toy / "lists.json"
    lists.write_text(json.dumps({"train": ["Ant", "cat"], "test": ["dog"]}))
    splits = load_tfds_images("toy", data_dir=toy, class_split=str(lists))
    assert dict(splits.class_names) == {"train": ("ant", "cat"), "test": ("dog",)}
    assert _values_by_class(splits) == {n: _EXPECTED[n] for n in ("ant", "cat", "dog")}


def test_decoded_images_are_kept(toy, monkeypatch):
    monkeypatch.setenv("META_JAX_CACHE", str(toy / "kept"))
    first = _values_by_class(load_tfds_images("toy", data_dir=toy, cache=True))
    monkeypatch.setattr(image_pool, "decode_images", None)
    assert _values_by_class(load_tfds_images("toy", data_dir=toy, cache=True)) == first
    with pytest.raises(TypeError):
        _values_by_class(load_tfds_images("toy", data_dir=toy, image_size=9, cache=True))


def test_data_folder_from_the_environment(toy, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(toy))
    assert _values_by_class(load_tfds_images("toy")) == _EXPECTED


def test_splits_are_pooled_and_repeated_examples_taken_once(tmp_path):
    records = _records()
    unlabelled = [{"image": _png(250), "label": -1}]
    splits = {"small": records[3:6], "train": records[:5], "test": records[5:] + unlabelled}
    _prepare(tmp_path / "toy" / "1.0.0", splits)
    found = _values_by_class(load_tfds_images("toy", data_dir=tmp_path))
    assert {name: sorted(values) for name, values in found.items()} == _EXPECTED


def test_one_bit_images_come_as_0_and_255(tmp_path):
    records = [{"image": _png(v, "1"), "label": c} for c in range(4) for v in (0, 1)]
    _prepare(tmp_path / "toy" / "1.0.0", {"train": records})
    values = _values_by_class(load_tfds_images("toy", data_dir=tmp_path))
    assert values == {name: [[0], [255]] for name in _NAMES}


def test_colour_images_keep_three_channels(tmp_path):
    records = [{"image": _png((c, 2, 9), "RGB"), "label": c} for c in range(4)]
    _prepare(tmp_path / "toy" / "1.0.0", {"train": records})
    values = _values_by_class(load_tfds_images("toy", data_dir=tmp_path))
    assert values == {name: [[c, 2, 9]] for c, name in enumerate(_NAMES)}


def test_other_feature_names_are_found(tmp_path):
    features = {
        "picture": tfds.features.Image(encoding_format="png"),
        "species": tfds.features.ClassLabel(names=_NAMES),
    }
    records = [{"picture": r["image"], "species": r["label"]} for r in _records()]
    _prepare(tmp_path / "toy" / "1.0.0", {"train": records}, features)
    assert _values_by_class(load_tfds_images("toy", data_dir=tmp_path)) == _EXPECTED


def test_highest_version_unless_named(toy):
    _prepare(toy / "toy" / "1.10.0", {"train": _records(3)})
    _prepare(toy / "toy" / "1.9.0", {"train": _records()})
    assert len(_values_by_class(load_tfds_images("toy", data_dir=toy))) == 3
    assert len(_values_by_class(load_tfds_images("toy:1.0.0", data_dir=toy))) == 4


def test_configuration_must_be_named_where_there_are_several(tmp_path):
    _prepare(tmp_path / "toy" / "big" / "1.0.0", {"train": _records()})
    _prepare(tmp_path / "toy" / "small" / "1.0.0", {"train": _records(3)})
    with pytest.raises(DataError, match="several configurations: toy/big, toy/small"):
        load_tfds_images("toy", data_dir=tmp_path)
    assert len(_values_by_class(load_tfds_images("toy/small", data_dir=tmp_path))) == 3


def _refused(data_dir, message, name="toy"):
    with pytest.raises(DataError, match=message) as error:
        dict(load_tfds_images(name, data_dir=data_dir).datasets)
    assert "\n" not in str(error.value)


def test_unprepared_set_is_refused(toy):
    _refused(toy, "'mnist' is not prepared in .*tfds build mnist", name="mnist")
    _refused(toy, "'toy:2.0.0' is not prepared", name="toy:2.0.0")
    _refused(toy / "nowhere", "'toy' is not prepared")


def test_tfrecord_format_is_refused(toy):
    info = toy / "toy" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    _refused(toy, "tfrecord format, which needs TensorFlow")


def test_a_missing_tfds_is_named_with_the_extra_that_brings_it(toy, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UsageError, match=r"toy.* not installed: pip install 'meta_jax\[data\]'"):
        load_tfds_images("toy", data_dir=toy)


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
def test_broken_metadata_is_refused(toy, file):
    (toy / "toy" / "1.0.0" / file).write_text("{")
    _refused(toy, "is not a readable TFDS set")


@pytest.mark.parametrize("damage", ["missing", "short", "without its end", "overwritten"])
def test_damaged_records_are_refused(toy, damage):
    path = toy / "toy" / "1.0.0" / "toy-train.array_record-00000-of-00001"
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(
            {
                "short": content[:300],
                "without its end": content[:65536],
                "overwritten": content[:70] + b"x" * 200 + content[270:],
            }[damage]
        )
    _refused(toy, "split 'train' of .* is missing or corrupt.*prepare it again")


def test_image_that_does_not_decode_is_named(tmp_path):
    records = _records()
    records[2] = {"image": records[2]["image"][:40], "label": 1}
    _prepare(tmp_path / "toy" / "1.0.0", {"train": records})
    _refused(tmp_path, r"tfds:toy, train\[2\] does not decode")


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"image": tfds.features.Image(encoding_format="png")}, "0 ClassLabel features"),
        ({"label": tfds.features.ClassLabel(names=_NAMES)}, "0 Image features"),
        (
            {
                "image": tfds.features.Image(encoding_format="png"),
                "fine": tfds.features.ClassLabel(names=_NAMES),
                "coarse": tfds.features.ClassLabel(names=_NAMES),
            },
            "2 ClassLabel features.*coarse, fine, image",
        ),
    ],
)
def test_sets_that_are_no_image_classification_are_refused(tmp_path, features, message):
    record = {"image": _png(0), "label": 0, "fine": 0, "coarse": 0}
    record = {key: record[key] for key in features}
    _prepare(tmp_path / "toy" / "1.0.0", {"train": [record]}, features)
    _refused(tmp_path, message)


def test_too_few_classes_are_refused(tmp_path):
    _prepare(tmp_path / "toy" / "1.0.0", {"train": _records(2)})
    _refused(tmp_path, "at least 3")


def test_real_omniglot(omniglot_tfds):
    splits = load_tfds_images("omniglot", data_dir=omniglot_tfds, image_size=4)
    train = splits.datasets["train"]
    # The only repeated drawing of the set is in one Braille character.
    assert sorted(train.counts) == [19] + [20] * 1037
    assert train.examples.shape == (1038 * 20 - 1, 4, 4, 1)
    assert np.asarray(train.examples).max() == 255
