"""The distance to a teacher's prediction: against its definition in fp64, in every space of predictions."""

from __future__ import annotations

import pytest
import torch

from tdc_fast.diffusion import Diffusion, distilled_losses, named_betas

T = 40


class Affine(torch.nn.Module):
    """Answers scale * x + y, and a constant variance value where the variance is learned."""

    def __init__(self, scale: float, learned: bool) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale, dtype=torch.float64))
        self.value = torch.nn.Parameter(torch.tensor(scale, dtype=torch.float64)) if learned else None

    def forward(self, x, t, y):
        out = self.scale * x + y.view(-1, 1, 1, 1)
        return out if self.value is None else torch.cat([out, self.value.expand_as(out)], dim=1)


@pytest.mark.parametrize(
    ("prediction", "variance", "loss"),
    [
        ("epsilon", "fixed_small", "mse"),
        ("x0", "fixed_large", "mse"),
        ("v", "learned_range", "rescaled_mse"),
        ("epsilon", "learned_range", "kl"),
    ],
)
def test_the_distance_is_that_of_the_predictions_at_the_same_noisy_image(prediction, variance, loss):
    diffusion = Diffusion(named_betas("cosine", T), prediction=prediction, variance=variance, loss=loss)
    student, teacher = (Affine(scale, variance == "learned_range") for scale in (0.7, 0.4))
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, T, 2, 3, 3, generator=generator, dtype=torch.float64).unbind()
    t, own, of_teacher = torch.arange(T), torch.linspace(0, 1, T).double(), torch.linspace(1, 0, T).double()
    losses = distilled_losses(diffusion, student, teacher, 0.3, x0, t, noise, {"y": own}, {"y": of_teacher})
    plain = diffusion.training_losses(student, x0, t, noise, {"y": own})
    alpha_bar = torch.from_numpy(diffusion.alphas_cumprod).view(-1, 1, 1, 1)
    x_t = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise
    difference = 0.3 * x_t + (own - of_teacher).view(-1, 1, 1, 1)
    expected = (difference**2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(losses["distillation"], expected)
    torch.testing.assert_close(losses["loss"], plain["loss"] + 0.3 * expected)
    assert losses.keys() == {*plain, "distillation"}
    (gradient,) = torch.autograd.grad(losses["distillation"].sum(), student.scale, retain_graph=True)
    torch.testing.assert_close(gradient, (2 * difference * x_t).mean(dim=(1, 2, 3)).sum())
    losses["loss"].sum().backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    if prediction == "epsilon" and loss == "mse":
        none = distilled_losses(diffusion, student, student, 9.0, x0, t, noise, {"y": own}, {"y": own})
        assert torch.equal(none["loss"], plain["loss"]) and not none["distillation"].any()
