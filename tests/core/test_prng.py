from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from droplora_jax.core import prng


def data(keys: jax.Array) -> np.ndarray:
    return np.asarray(jax.random.key_data(keys))


def test_root_key_is_threefry_whatever_the_default():
    with jax.default_prng_impl("rbg"):
        key = prng.root_key(7)
    assert jax.random.key_impl(key) == jax.random.key_impl(jax.random.key(0, impl="threefry2x32"))
    np.testing.assert_array_equal(data(key), [0, 7])


def test_keys_of_names_and_paths_never_change():
    """Literal numbers: resuming a run with a later version must draw the same masks."""
    key = prng.root_key(0)
    np.testing.assert_array_equal(data(prng.fold_name(key, "mask")), [456544294, 4174282552])
    path = ("layers", 3, "self_attn", "q_proj")
    np.testing.assert_array_equal(data(prng.fold_path(key, path)), [881350344, 2639651825])


def test_the_roots_of_a_run_are_those_of_their_names():
    keys = prng.run_keys(0)
    assert keys._fields == ("mask", "init", "generate")
    np.testing.assert_array_equal(data(keys.mask), [456544294, 4174282552])
    for name, key in keys._asdict().items():
        np.testing.assert_array_equal(data(key), data(prng.fold_name(prng.root_key(0), name)))


def test_names_paths_and_layers_have_different_keys():
    root = prng.root_key(0)
    keys = [
        prng.fold_name(root, "mask"),
        prng.fold_name(root, "data"),
        prng.fold_path(root, ("layers", "q_proj")),
        prng.fold_path(root, ("layers", "k_proj")),
        prng.fold_path(root, ("layers", 0, "q_proj")),
        prng.fold_path(root, ("layers", 1, "q_proj")),
        prng.fold_path(root, ("layers", 1, "experts", 0, "q_proj")),
        prng.fold_path(root, ("layers", 0, "experts", 1, "q_proj")),
        prng.fold_path(prng.root_key(1), ("layers", "q_proj")),
    ]
    assert len({tuple(data(key)) for key in keys}) == len(keys)


def test_a_list_and_a_stack_of_layers_have_the_same_keys():
    root = prng.root_key(0)
    stacked = prng.fold_stack(prng.fold_path(root, ("layers", "q_proj")), (4,))
    listed = [prng.fold_path(root, ("layers", i, "q_proj")) for i in range(4)]
    np.testing.assert_array_equal(data(stacked), [data(key) for key in listed])

    stacked = prng.fold_stack(prng.fold_path(root, ("layers", "experts", "up")), (2, 3))
    listed = [
        [prng.fold_path(root, ("layers", i, "experts", j, "up")) for j in range(3)]
        for i in range(2)
    ]
    np.testing.assert_array_equal(data(stacked), [[data(key) for key in row] for row in listed])


def test_fold_each_and_fold_rows_are_fold_in_of_every_number():
    fold = jax.random.fold_in
    keys = prng.fold_stack(prng.root_key(0), (2,))
    rows = jnp.asarray([5, 0, 9])
    each = prng.fold_each(keys, rows)
    expected = [[data(fold(key, row)) for row in rows] for key in keys]
    np.testing.assert_array_equal(data(each), expected)

    documents = jnp.asarray([[1, 1, 2, 0], [1, 2, 3, 3], [4, 4, 4, 4]])
    per_position = prng.fold_rows(each, documents)
    assert per_position.shape == (2, 3, 4)
    for layer in range(2):
        for row in range(3):
            expected = [data(fold(each[layer, row], d)) for d in documents[row]]
            np.testing.assert_array_equal(data(per_position[layer, row]), expected)
