from __future__ import annotations

import pytest

from t5x_ext.contracts import UserError
from t5x_ext.models import LayerSharing


def released_code(scheme, layers, share_layer_num):
    """The map that Takase & Kiyono's script builds, simulated layer by layer."""
    built = []
    if scheme == "sequence":
        shared = 0
        for _ in range(layers):
            built.append(built[-1] + 1 if shared == 0 and built else (built[-1] if built else 0))
            shared = (shared + 1) % share_layer_num
        return tuple(built)
    unique = -(-layers // share_layer_num)
    built = list(range(unique))
    if scheme == "cycle":
        built += [i % unique for i in range(layers - unique)]
        return tuple(built)
    built += [i % unique for i in range(layers - 2 * unique)]
    base = built[:unique]
    built += [base[-((i % unique) + 1)] for i in range(layers - len(built))]
    return tuple(built)


def schemes(layers):
    """Every sharing that a stack of `layers` positions can have."""
    yield LayerSharing("none")
    yield LayerSharing("universal")
    if layers >= 3:
        yield LayerSharing("sandwich")
    for scheme in ("sequence", "cycle", "cycle_rev"):
        for uses in range(1, layers + 1):
            yield LayerSharing(scheme, unique_layers=-(-layers // uses), allow_uneven=True)


@pytest.mark.parametrize(
    ("sharing", "layers", "expected"),
    [
        (LayerSharing("none"), 6, (0, 1, 2, 3, 4, 5)),
        (LayerSharing("universal"), 6, (0, 0, 0, 0, 0, 0)),
        (LayerSharing("sequence", 3), 6, (0, 0, 1, 1, 2, 2)),
        (LayerSharing("cycle", 3), 6, (0, 1, 2, 0, 1, 2)),
        (LayerSharing("cycle_rev", 3), 6, (0, 1, 2, 2, 1, 0)),
        (LayerSharing("sandwich"), 6, (0, 1, 1, 1, 1, 2)),
        (LayerSharing("cycle_rev", 6), 18, (0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 5, 4, 3, 2, 1, 0)),
        (LayerSharing("cycle_rev", 3, allow_uneven=True), 8, (0, 1, 2, 0, 1, 2, 1, 0)),
        (LayerSharing("cycle_rev", 3, allow_uneven=True), 10, (0, 1, 2, 0, 1, 2, 0, 2, 1, 0)),
    ],
)
def test_layer_map_is_the_published_table(sharing, layers, expected):
    assert sharing.layer_map(layers) == expected


@pytest.mark.parametrize("scheme", ["sequence", "cycle", "cycle_rev"])
def test_layer_map_follows_the_released_code(scheme):
    for layers in range(1, 25):
        for share_layer_num in range(1, layers + 1):
            unique = -(-layers // share_layer_num)
            if -(-layers // -(-layers // unique)) != unique:
                continue  # `sequence` can leave the number of sets below ceil(N/k); no other k gives this M
            canonical = -(-layers // unique)
            sharing = LayerSharing(scheme, unique, allow_uneven=True)
            assert sharing.layer_map(layers) == released_code(scheme, layers, canonical)


@pytest.mark.parametrize("scheme", ["sequence", "cycle", "cycle_rev"])
def test_even_maps_use_every_set_equally(scheme):
    for sets, uses in [(1, 4), (3, 2), (6, 2), (6, 3), (4, 1)]:
        layer_map = LayerSharing(scheme, sets).layer_map(sets * uses)
        assert [layer_map.count(index) for index in range(sets)] == [uses] * sets


@pytest.mark.parametrize("scheme", ["none", "sequence", "cycle", "cycle_rev"])
def test_as_many_sets_as_layers_is_the_ordinary_model(scheme):
    assert LayerSharing(scheme, 5).layer_map(5) == (0, 1, 2, 3, 4)


@pytest.mark.parametrize("scheme", ["universal", "sequence", "cycle", "cycle_rev"])
def test_one_set_makes_the_schemes_agree(scheme):
    assert LayerSharing(scheme, 1).layer_map(5) == (0,) * 5


def test_runs_spell_out_the_map():
    for layers in range(1, 19):
        for sharing in schemes(layers):
            runs = sharing.runs(layers)
            assert tuple(index for run in runs for index in run.sets()) == sharing.layer_map(layers)
            assert [run.position for run in runs] == [sum(r.length for r in runs[:i]) for i in range(len(runs))]


@pytest.mark.parametrize(
    ("sharing", "layers", "expected"),
    [
        (LayerSharing("none"), 6, 1),
        (LayerSharing("universal"), 6, 1),
        (LayerSharing("sequence", 3), 6, 1),
        (LayerSharing("cycle", 3), 9, 3),
        (LayerSharing("cycle_rev", 3), 6, 2),
        (LayerSharing("sandwich"), 6, 3),
    ],
)
def test_number_of_runs(sharing, layers, expected):
    assert len(sharing.runs(layers)) == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LayerSharing("cycles"), "must be one of none, universal, sequence, cycle, cycle_rev, sandwich"),
        (lambda: LayerSharing("cycle"), "unique_layers is missing"),
        (lambda: LayerSharing("cycle", 0), "positive integer"),
        (lambda: LayerSharing("cycle", 4).layer_map(6), "does not divide 6"),
        (lambda: LayerSharing("cycle", 7, allow_uneven=True).layer_map(6), "the stack has 6"),
        (lambda: LayerSharing("sequence", 6, allow_uneven=True).layer_map(10), "make 5 sets"),
        (lambda: LayerSharing("universal", 2).layer_map(6), "has 1"),
        (lambda: LayerSharing("none", 2).layer_map(6), "has 6"),
        (lambda: LayerSharing("sandwich").layer_map(2), "needs 3 layers"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_mistakes_are_one_line(make, message):
    with pytest.raises(UserError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
