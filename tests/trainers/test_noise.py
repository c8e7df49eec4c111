"""Noise is what it is for, and nothing else: the same wherever and whenever it is drawn."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from trainers.noise import Layer, Noise, token_keys


def layer(name: str, dropout: float = 0.5) -> Layer:
    return SimpleNamespace(name=name, dropout=dropout)  # type: ignore[return-value]


def noise(keys: np.ndarray) -> Noise:
    out = Noise()
    out.keys_T = torch.from_numpy(keys)
    return out


def test_a_share_is_dropped_and_the_mean_stays() -> None:
    dropped = noise(token_keys(1, 2, 3, 2000)).dropout(torch.ones(2000, 576), layer("layer", 0.1))
    zero = (dropped == 0).double()
    assert zero.mean().item() == pytest.approx(0.1, abs=1e-3)
    assert dropped.mean().item() == pytest.approx(1.0, abs=2e-3)
    # As independent draws would be: by row, by column, and beside each other.
    assert zero.mean(1).std().item() == pytest.approx((0.09 / 576) ** 0.5, rel=0.1)
    assert zero.mean(0).std().item() == pytest.approx((0.09 / 2000) ** 0.5, rel=0.15)
    centred = zero - zero.mean()
    assert abs((centred[1:] * centred[:-1]).mean() / centred.var()) < 0.005
    assert abs((centred[:, 1:] * centred[:, :-1]).mean() / centred.var()) < 0.005


def test_uniform_noise_is_uniform() -> None:
    drawn = noise(token_keys(0, 0, 0, 1000)).uniform(torch.empty(1000, 200), "layer")
    assert drawn.mean().item() == pytest.approx(0, abs=5e-3) and drawn.var().item() == pytest.approx(1 / 3, abs=5e-3)
    assert -1 <= drawn.min() < -0.999 and 0.999 < drawn.max() <= 1


def test_it_depends_on_seed_step_example_position_layer_and_feature_alone() -> None:
    x = torch.ones(8, 64)
    keys = token_keys(1, 2, 3, 8)
    one = noise(keys).dropout(x, layer("a"))
    assert torch.equal(one, noise(token_keys(1, 2, 3, 8)).dropout(x, layer("a")))
    assert torch.equal(one[3:5], noise(keys[3:5]).dropout(x[3:5], layer("a")))  # wherever the token lies
    others = [noise(token_keys(*key, 8)).dropout(x, layer("a")) for key in ((0, 2, 3), (1, 1, 3), (1, 2, 2))]
    for other in (*others, noise(keys).dropout(x, layer("b"))):
        assert 0.3 < (other != one).double().mean() < 0.7


def test_without_keys_there_is_none() -> None:
    x = torch.ones(2, 3)
    assert Noise().dropout(x, layer("a")) is x
