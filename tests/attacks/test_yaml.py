"""A5: a YAML file is plain values, read in bounded time and memory, and every name in it is one that is known."""

from __future__ import annotations

import time
import tracemalloc

import pytest
import yaml

from minillm.yaml_reader import MAX_BYTES, MAX_NODES, read_yaml
from tests.attacks.hostile import Place, Run, fired, refused

PAYLOADS = {
    "apply": "a: !!python/object/apply:os.system ['touch MARKER']",
    "new": "a: !!python/object/new:os.system ['touch MARKER']",
    "name": "a: !!python/name:os.system",
    "module": "a: !!python/module:antigravity",
    "tuple": "a: !!python/tuple [1]",
    "own tag": "a: !touch MARKER",
    "binary": "a: !!binary AAAA",
    "verbatim": "a: !<tag:yaml.org,2002:python/name:os.system> ''",
    "declared": "%TAG ! tag:yaml.org,2002:python/\n---\na: !name:os.system ''",
}
BOMB = "\n".join(
    ["a0: &a0 [x,x,x,x,x,x,x,x,x]"] + [f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
)
SHAPES = {
    "aliases of aliases": (BOMB, "anchor '&a0'"),
    "an alias of itself": ("a: &a [*a]", "anchor '&a'"),
    "a merged mapping": ("<<: {seed: 3}", "<<"),
    "a merged alias": ("a: &a {seed: 3}\nb: {<<: *a}", "anchor '&a'"),
    "a key twice": ("seed: 1\nseed: 2", "given twice"),
    "depth": ("a: " + "[" * 100_000, "levels deep"),
    "depth of mappings": ("a: " + "{a: " * 10_000, "levels deep"),
    "a scalar of 10 MB": ("a: " + "x" * 10_000_000, "larger than"),
    "a quoted scalar of 10 MB": ("a: '" + "x" * 10_000_000 + "'", "larger than"),
    "a number of many digits": ("seed: " + "9" * 20_000, "digits"),
    "very many keys": ("\n".join(f"k{n}: 1" for n in range(2_000)), "is this the right file?"),
    "very many values": ("a: [" + "1," * 400_000 + "]", "more than 20,000 values"),
    "two documents": ("seed: 1\n---\nseed: 2", "second document"),
    "an unknown key": ("seeed: 1", "did you mean 'seed'"),
    "a key that names an object": ("_target_: os.system", "no setting of this name"),
    "a key that names a component": ("stages: [{kind: sft, _component_: os.system}]", "_component_"),
    "a kind that names a class": ("stages: [{kind: os.system}]", "kind"),
}
SECONDS, MEMORY = 10.0, 64 * 2**20


@pytest.mark.parametrize("what", PAYLOADS)
@pytest.mark.parametrize("as_card", [False, True])
def test_a_tag_is_refused_in_a_configuration_and_in_a_card(what: str, as_card: bool, place: Place, run: Run) -> None:
    file = place.top / "hostile.yaml"
    file.write_text(PAYLOADS[what].replace("MARKER", str(place.marker)))
    arguments = (place.config, f"student={file}") if as_card else (file,)
    refused(run("distill", "--config", *arguments), "ConfigError", "hostile.yaml", "is not allowed")


def test_a_tag_is_refused_in_an_override_too(place: Place, run: Run) -> None:
    outcome = run("distill", "--config", place.config, "name=!!python/object/apply:os.system [id]")
    refused(outcome, "ConfigError", "is not allowed")


@pytest.mark.parametrize("what", ["apply", "new"])
def test_control_a_careless_reader_runs_it(what: str, place: Place) -> None:
    yaml.load(PAYLOADS[what].replace("MARKER", str(place.marker)), Loader=yaml.UnsafeLoader)
    fired(place.marker)


@pytest.mark.parametrize("what", SHAPES)
def test_a_hostile_shape_is_refused_in_bounded_time_and_memory(what: str, place: Place, run: Run) -> None:
    text, told = SHAPES[what]
    file = place.top / "hostile.yaml"
    file.write_text(text)
    started = time.process_time()
    outcome = run("distill", "--config", file)
    spent = time.process_time() - started
    assert outcome.code == 2 and told in outcome.err and len(outcome.err) < 3000, outcome.err[:500]
    assert spent < SECONDS, spent


@pytest.mark.parametrize("what", ["aliases of aliases", "a scalar of 10 MB"])
def test_it_is_refused_in_bounded_memory_too(what: str, place: Place, run: Run) -> None:
    file = place.top / "hostile.yaml"
    file.write_text(SHAPES[what][0])
    tracemalloc.start()
    try:
        assert run("distill", "--config", file).code == 2
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()


def test_control_the_ordinary_reader_makes_a_tree_that_nobody_can_walk() -> None:
    found = yaml.safe_load(BOMB)
    leaves: dict[int, int] = {}

    def count(value: object) -> int:
        if not isinstance(value, list):
            return 1
        if id(value) not in leaves:
            leaves[id(value)] = sum(map(count, value))
        return leaves[id(value)]

    assert count(found["a11"]) == 9**12  # 282 billion, from a kilobyte


def test_the_slowest_file_that_is_read_takes_seconds() -> None:
    many = "a: [" + "1," * (MAX_NODES - 10) + "]"
    for text in (many, "a: '" + "x" * (MAX_BYTES - 6) + "'"):
        started = time.process_time()
        read_yaml(text, source="f")
        assert time.process_time() - started < SECONDS
