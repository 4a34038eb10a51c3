import torch
from hypothesis import given
from hypothesis import strategies as st

from gradnoise.base.streams import generator

_names = st.sampled_from(["init", "data", "noise", "evaluation", "world"])
_keys = st.tuples(st.integers(0, 2**63 - 1), _names, st.integers(-1, 10**6))


@given(_keys)
def test_a_stream_is_a_function_of_its_key_alone(key: tuple[int, str, int]) -> None:
    torch.manual_seed(0)
    first = torch.randn(4, generator=generator(*key))
    torch.manual_seed(1)
    assert torch.equal(first, torch.randn(4, generator=generator(*key)))


@given(_keys, _keys)
def test_other_keys_are_other_streams(one: tuple[int, str, int], other: tuple[int, str, int]) -> None:
    same = torch.equal(torch.randn(4, generator=generator(*one)), torch.randn(4, generator=generator(*other)))
    assert same == (one == other)
