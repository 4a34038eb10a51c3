import torch

from gradnoise.base.streams import generator
from gradnoise.base.study import Model
from gradnoise.models.decoder import Decoder

SETTINGS = Model(width=32, layers=2, heads=2)


def decoder(seed: int = 0, **changes: object) -> Decoder:
    given: dict[str, object] = {
        "inputs": 32,
        "outputs": 16,
        "context": 7,
        "readout": "last",
        "token_inputs": False,
        "generator": generator(seed, "init"),
    }
    return Decoder(SETTINGS, **(given | changes))  # type: ignore[arg-type]


def test_the_pilots_model_has_the_size_counted_by_hand() -> None:
    assert sum(p.numel() for p in decoder().parameters()) == 27_280


def test_weights_come_from_the_named_stream_alone() -> None:
    torch.manual_seed(1)
    one = decoder().state_dict()
    torch.manual_seed(2)
    assert all(torch.equal(one[name], value) for name, value in decoder().state_dict().items())
    assert not torch.equal(one["head.weight"], decoder(seed=1).state_dict()["head.weight"])


def test_a_token_sees_only_what_came_before() -> None:
    model = decoder(readout="all")
    inputs = torch.randn(2, 7, 32)
    changed = inputs.clone()
    changed[:, 4] += 1
    before, after = model(inputs), model(changed)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_last_readout_is_the_last_of_all() -> None:
    inputs = torch.randn(3, 7, 32)
    torch.testing.assert_close(decoder(readout="all")(inputs)[:, -1], decoder()(inputs))


def test_tokens_are_embedded() -> None:
    model = decoder(inputs=65, outputs=65, token_inputs=True, readout="all")
    assert model(torch.randint(65, (2, 7))).shape == (2, 7, 65)
