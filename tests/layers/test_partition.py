"""Groups of leaves and of slices of leaves: every entry of the tree is in one of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import hessdensity as hd
from hessdensity.layers.partition import group_of, partition
from hessdensity.vectors import trees

SHAPES = {
    "attention": {"out": (4, 6), "qkv": (4, 6)},
    "experts": {"bias": (3, 2), "up": (3, 2, 2)},
    "head": {"bias": (3,), "kernel": (2, 3)},
    "scale": (),
}
LIKE = jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
    SHAPES,
    is_leaf=lambda node: isinstance(node, tuple),
)
PARTITIONS = {
    "leaves": None,
    "globs": ["attention/*", "experts/*", "head/*", "scale"],
    "one glob": "*",
    "predicates": {"with bias": lambda path: "bias" in path, "other": lambda p: "bias" not in p},
    "heads": {**hd.slices("attention/qkv", 1, 3), "rest": lambda path: path != "attention/qkv"},
    "heads from behind": {
        **hd.slices("attention/qkv", -1, 3),
        "rest": lambda path: path != "attention/qkv",
    },
    "experts": {**hd.slices("experts/*", 0, 3), "rest": lambda path: "experts" not in path},
    "rows and columns of different leaves": {
        **hd.slices("attention/out", 0, 2),
        **hd.slices("attention/qkv", 1, 2),
        "rest": lambda path: "attention" not in path,
    },
}


def random_tree(*lead):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal((*lead, *leaf.shape)), leaf.dtype), LIKE
    )


def zeros(*lead):
    return jax.tree.map(lambda leaf: jnp.zeros((*lead, *leaf.shape), leaf.dtype), LIKE)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("name", PARTITIONS)
def test_every_entry_is_in_one_group(name):
    counts = zeros()
    groups = partition(LIKE, PARTITIONS[name])
    for group in groups.values():
        counts = group.put(counts, jax.tree.map(lambda leaf: leaf + 1, group.take(counts)))
    assert_equal(counts, jax.tree.map(jnp.ones_like, counts))
    sizes = [trees.size(group.take(LIKE)) for group in groups.values()]
    assert sum(sizes) == trees.size(LIKE) == 76


@pytest.mark.parametrize("lead", [(), (2,)])
@pytest.mark.parametrize("name", PARTITIONS)
def test_a_part_that_is_put_is_the_part_that_is_taken(name, lead):
    tree, other = random_tree(*lead), zeros(*lead)
    for group in partition(LIKE, PARTITIONS[name]).values():
        part = group.take(tree, len(lead))
        before = other
        other = group.put(other, part, len(lead))
        assert_equal(group.take(other, len(lead)), part)
        # Nothing else has changed: without the part, it is the tree of before.
        without = group.put(other, group.take(zeros(*lead), len(lead)), len(lead))
        assert_equal(without, before)
    assert_equal(other, tree)


@pytest.mark.parametrize("name", PARTITIONS)
def test_the_shapes_of_a_part_are_those_of_its_arrays(name):
    for group in partition(LIKE, PARTITIONS[name]).values():
        described, arrays = group.take(LIKE), group.take(zeros())
        assert jax.tree.structure(described) == jax.tree.structure(arrays)
        assert trees.paths(described) == trees.paths(arrays)
        for shape, array in zip(*map(jax.tree.leaves, (described, arrays)), strict=True):
            assert (shape.shape, shape.dtype) == (array.shape, array.dtype)


def test_names_are_the_paths_the_globs_or_those_given():
    assert list(partition(LIKE)) == trees.paths(LIKE)
    assert list(partition(LIKE, PARTITIONS["globs"])) == PARTITIONS["globs"]
    assert list(partition(LIKE, PARTITIONS["one glob"])) == ["*"]
    assert list(partition(LIKE, PARTITIONS["experts"])) == [
        *(f"experts/*[{part}]" for part in range(3)),
        "rest",
    ]


def test_a_slice_of_several_leaves_has_a_part_of_each():
    tree = random_tree()
    middle = partition(LIKE, PARTITIONS["experts"])["experts/*[1]"]
    part = middle.take(tree)
    np.testing.assert_array_equal(part["experts"]["bias"], tree["experts"]["bias"][1:2])
    np.testing.assert_array_equal(part["experts"]["up"], tree["experts"]["up"][1:2])
    assert part["scale"] is None
    # Of two axes from behind, one has another place in each leaf.
    last = group_of(LIKE, "last", hd.LeafSlice("experts/*", -1, 1, 2)).take(tree)
    np.testing.assert_array_equal(last["experts"]["bias"], tree["experts"]["bias"][:, 1:])
    np.testing.assert_array_equal(last["experts"]["up"], tree["experts"]["up"][:, :, 1:])


def test_a_group_describes_its_leaves_and_slices():
    groups = partition(LIKE, PARTITIONS["heads from behind"])
    names = trees.paths(LIKE)
    assert groups["attention/qkv[2]"].describe(names) == ["attention/qkv, axis 1 from 4 to 6"]
    assert "attention/out" in groups["rest"].describe(names)


def test_equal_groups_are_one_key_of_compiled_programs():
    ours, theirs = (partition(LIKE, PARTITIONS["heads"]) for _ in range(2))
    assert set(ours.values()) == set(theirs.values())
    assert len(set(ours.values())) == 4


def test_a_slice_is_not_sharded_along_its_own_axis():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    leaf = jax.ShapeDtypeStruct(
        (8, 4), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("a", "b"))
    )
    for axis, spec in ((0, (None, "b")), (1, ("a", None))):
        part = group_of([leaf], "half", hd.LeafSlice("0", axis, 1, 2)).take([leaf])[0]
        assert tuple(part.sharding.spec) == spec
    short = leaf.update(sharding=NamedSharding(mesh, PartitionSpec("a")))
    part = group_of([short], "half", hd.LeafSlice("0", 1, 0, 2)).take([short])[0]
    assert tuple(part.sharding.spec) == ("a", None)


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        (["attention/*", "*"], "'attention/\\*' and '\\*' both have leaf 'attention/out'"),
        (
            {**hd.slices("attention/qkv", 1, 3), "all": "*"},
            r"'attention/qkv\[0\]' and 'all' both have leaf 'attention/qkv'. Each entry must be in",
        ),
        (
            {
                "left": hd.LeafSlice("attention/qkv", 1, 0, 2),
                "third": hd.LeafSlice("attention/qkv", 1, 1, 3),
                "rest": lambda path: path != "attention/qkv",
            },
            "'left' and 'third' both have leaf 'attention/qkv'",
        ),
        (
            {
                "row": hd.LeafSlice("attention/qkv", 0, 0, 2),
                "column": hd.LeafSlice("attention/qkv", 1, 1, 2),
            },
            "'row' and 'column' both have leaf 'attention/qkv'",
        ),
        (
            ["attention/*", "head/*", "scale"],
            "groups: 'experts/bias', 'experts/up' are not, or not",
        ),
        (
            {
                "first": hd.LeafSlice("attention/qkv", 1, 0, 3),
                "rest": lambda path: path != "attention/qkv",
            },
            "groups: 'attention/qkv' are not, or not wholly, in a group. Add a group for them",
        ),
        ([], r"groups: 'attention/out', .*are not, or not wholly, in a group"),
        (["attention/*", "body/*"], r"where='body/\*' matches no leaf"),
        (
            hd.slices("attention/qkv", 1, 4),
            r"groups\['attention/qkv\[0\]'\]: axis 1 of leaf 'attention/qkv' with shape \[4, 6\] "
            "cannot be divided into 4 equal parts",
        ),
        ({"x": hd.LeafSlice("scale", 0, 0, 1)}, "axis 0 of leaf 'scale' with shape"),
        ({"x": hd.LeafSlice("head/bias", -2, 0, 1)}, "axis -2 of leaf 'head/bias'"),
        (
            {"x": hd.LeafSlice("head/bias", 0, 3, 3)},
            r"groups\['x'\]: part=3, expected.* from 0 to 2",
        ),
        ({"x": hd.LeafSlice("head/bias", 0, 0, 0)}, r"groups\['x'\]: parts=0, expected"),
    ],
)
def test_groups_that_overlap_or_leave_something_out_are_refused_by_name(groups, said):
    with pytest.raises(ValueError, match=said):
        partition(LIKE, groups)


def test_many_leaves_without_a_group_are_named_in_part():
    like = {f"leaf{i:02}": jax.ShapeDtypeStruct((1,), jnp.float32) for i in range(14)}
    with pytest.raises(ValueError, match=r"'leaf10' and others are not, or not wholly, in a group"):
        partition(like, ["leaf00"])


@pytest.mark.parametrize("parts", [0, 1.5, True])
def test_the_number_of_parts_is_a_positive_whole_number(parts):
    with pytest.raises(ValueError, match=f"parts={parts!r}, expected a whole number"):
        hd.slices("*", 0, parts)
