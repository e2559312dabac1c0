"""Numbers of pictures whose look is known."""

import pytest
import torch

from diffalign.telemetry import dark, drift, looks, saturation, sharpness


def plain(red: float, green: float, blue: float) -> torch.Tensor:
    return torch.tensor([red, green, blue], dtype=torch.float32).view(1, 3, 1, 1).expand(1, 3, 8, 8)


def test_saturation_is_that_of_hsv() -> None:
    for color, expected in (((1, 0, 0), 1), ((0.5, 0.25, 0.25), 0.5), ((0.7, 0.7, 0.7), 0), ((0, 0, 0), 0)):
        assert saturation(plain(*color)).item() == pytest.approx(expected)


def test_sharpness_grows_with_noise_and_is_zero_on_a_slope() -> None:
    slope = torch.linspace(0, 1, 16).expand(1, 3, 16, 16)
    assert sharpness(slope).item() == pytest.approx(0, abs=1e-6)
    board = (torch.arange(16)[:, None] + torch.arange(16)).remainder(2).float().expand(1, 3, 16, 16)
    assert sharpness(board).item() == pytest.approx(4)
    g = torch.Generator().manual_seed(0)
    noise = torch.rand(1, 3, 16, 16, generator=g)
    assert sharpness(noise) > sharpness(0.5 + 0.1 * noise) > 0


def test_dark_is_a_share_of_pixels() -> None:
    half = plain(1, 1, 1).clone()
    half[..., :4] = 0.05
    assert dark(half).item() == pytest.approx(0.5)
    assert dark(plain(0, 0, 1)).item() == 0  # blue is dim, and no black


def test_drift_is_the_difference_from_the_base() -> None:
    assert drift(plain(1, 1, 1), plain(0.75, 0.75, 0.75)).item() == pytest.approx(0.25)
    assert drift(plain(0.2, 0.4, 0.6), plain(0.2, 0.4, 0.6)).item() == 0


def test_each_picture_has_its_own_numbers() -> None:
    pixels = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    together = looks(pixels, pixels.flip(0))
    assert set(together) == {"saturation", "sharpness", "dark", "drift"} and "drift" not in looks(pixels)
    for name, values in together.items():
        alone = torch.cat([looks(pixels[i : i + 1], pixels.flip(0)[i : i + 1])[name] for i in range(3)])
        torch.testing.assert_close(values, alone)
    assert together["drift"][1] == 0 < together["drift"][0]
