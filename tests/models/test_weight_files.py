"""Weight files can be exchanged with plain Keras, and training goes on from them."""

import h5py
import keras
import pytest
from frameworks import assert_array_equal
from models_to_save import (
    WAYS,
    FunctionalSubclass,
    Plain,
    PlainFunctionalSubclass,
    Subclass,
    X,
    assert_different_state,
    assert_same_state,
    compiled,
    graph,
    prepared,
    sequential,
    train,
)
from parameters import slow_but

from keras_infomcr import RegularizedModel
from keras_infomcr.models.training_record import training_record

PAIRS = {
    "functional": (lambda: keras.Model(*graph()), WAYS["functional"]),
    "subclass": (Plain, Subclass),
    "functional subclass": (PlainFunctionalSubclass, FunctionalSubclass),
    "from Functional": (lambda: keras.Model(*graph()), WAYS["from Functional"]),
    "from Sequential": (sequential, WAYS["from Sequential"]),
    "from deferred Sequential": (
        lambda: sequential(built=False),
        WAYS["from deferred Sequential"],
    ),
    "from subclass": (Plain, WAYS["from subclass"]),
    "from functional subclass": (PlainFunctionalSubclass, WAYS["from functional subclass"]),
}


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize(
    "pair", slow_but(PAIRS, "functional", "subclass", "from deferred Sequential", "from subclass")
)
def test_weight_files_are_those_of_a_plain_model(pair, is_compiled, tmp_path):
    path = tmp_path / "model.weights.h5"
    for source, target in (PAIRS[pair], PAIRS[pair][::-1]):
        source = prepared(source, is_compiled, steps=1)
        target = prepared(target, is_compiled)
        assert_different_state(source, target)
        source.save_weights(path)
        target.load_weights(path)
        assert_same_state(source, target)


@pytest.mark.parametrize("way", ["subclass", "functional subclass", "from subclass"])
def test_weight_files_load_back_and_training_goes_on(way, tmp_path):
    source, target = train(compiled(WAYS[way]())), compiled(WAYS[way]())
    target(X)
    target.optimizer.build(target.trainable_variables)
    source.save_weights(tmp_path / "model.weights.h5")
    target.load_weights(tmp_path / "model.weights.h5")
    assert_same_state(train(source), train(target))


@pytest.mark.parametrize("pair", PAIRS)
def test_no_extra_weights(pair):
    plain, model = (prepared(make, True) for make in PAIRS[pair])
    for kind in ("weights", "trainable_weights", "non_trainable_weights", "variables"):
        ours, theirs = (
            [(v.shape, v.dtype) for v in getattr(m, kind) if "metric" not in v.path]
            for m in (model, plain)
        )
        assert ours == theirs
    assert len(model.metrics_names) == len(plain.metrics_names)
    assert len(model.optimizer.variables) == len(plain.optimizer.variables)
    assert model.count_params() == plain.count_params()


@pytest.mark.parametrize(
    "pair", ["functional", "subclass", "from deferred Sequential", "from functional subclass"]
)
def test_weights_of_whole_model_files(pair, tmp_path):
    """`load_weights` also reads `.keras` files."""
    make_plain, make_ours = PAIRS[pair]
    path = tmp_path / "model.keras"
    for make_source in (make_ours, make_plain):
        source, target = prepared(make_source, True, steps=1), prepared(make_ours, True)
        source.save(path)
        target.load_weights(path)
        assert_same_state(source, target)


@pytest.mark.parametrize("way", ["functional", "from subclass"])
def test_sharded_weight_files(way, tmp_path):
    source, target = prepared(WAYS[way], True, steps=1), prepared(WAYS[way], True)
    source.save_weights(tmp_path / "model.weights.json", max_shard_size=1e-7)
    assert len(list(tmp_path.glob("*.weights.h5"))) > 1
    target.load_weights(tmp_path / "model.weights.json")
    assert_same_state(source, target)


def test_a_wrapped_model_of_another_shape_is_refused(tmp_path):
    source, target = prepared(WAYS["from subclass"], True), WAYS["from subclass"]()
    source.save_weights(tmp_path / "model.weights.h5")
    target(X[:, :3])
    before = target.get_weights()
    with pytest.raises(ValueError, match="could not be loaded"):
        target.load_weights(tmp_path / "model.weights.h5")
    with pytest.warns(UserWarning, match="could not be loaded"):
        target.load_weights(tmp_path / "model.weights.h5", skip_mismatch=True)
    assert_array_equal(before[0], target.get_weights()[0])
    assert_array_equal(source.get_weights()[-1], target.get_weights()[-1])


def test_a_wrapped_model_keeps_the_state_of_a_compiled_original(tmp_path):
    original = prepared(Plain, True, steps=1)
    optimizer = original.optimizer
    model = train(compiled(RegularizedModel.from_model(original)))
    model.save_weights(tmp_path / "model.weights.h5")
    model.load_weights(tmp_path / "model.weights.h5")
    assert original.optimizer is optimizer
    assert int(optimizer.iterations) == 1
    assert not hasattr(original, "_training_record")
    assert int(model.optimizer.iterations) == 1


@pytest.mark.parametrize("way", ["functional", "from subclass"])
def test_files_in_which_the_peak_had_a_group_of_its_own(way, tmp_path):
    """Such files were written when `learning_rate_peak` was an attribute of the model."""
    path = tmp_path / "old.weights.h5"
    model = train(compiled(WAYS[way]()))
    training_record(model).update_peak(0.5)
    model.save_weights(path)
    with h5py.File(path, "a") as file:
        del file["learning_rate_peak"]
        file.move("_training_record", "learning_rate_peak")
    resumed = train(compiled(WAYS[way]()))
    resumed.load_weights(path)
    assert training_record(resumed).recall_peak() == 0.5
