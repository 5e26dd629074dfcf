"""The adversarial loss of VQGAN (arXiv 2012.09841), which stage 1 can use: a PatchGAN
discriminator, hinge loss, and a weight that adapts to the other losses."""
import torch
import torch.nn as nn
import torch.nn.functional as F

from plumbing import config

# Letters: B batch, S image side, s side of the map of logits.


class PatchGAN(nn.Sequential):
    """Discriminator of overlapping patches (pix2pix): (B, 3, S, S) -> logits (B, 1, s, s)."""

    def __init__(self, width=64, layers=3, size=256):
        layers = max(1, min(layers, size.bit_length() - 4))      # at 32 px: two halvings
        parts = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(layers):
            a, b = width * min(2 ** i, 8), width * min(2 ** (i + 1), 8)
            parts += [nn.Conv2d(a, b, 4, 2 if i < layers - 1 else 1, 1, bias=False),
                      nn.BatchNorm2d(b), nn.LeakyReLU(0.2)]
        super().__init__(*parts, nn.Conv2d(b, 1, 4, 1, 1))
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(m.weight, 0, 0.02)


class GAN:
    """The adversarial loss of VQGAN (arXiv 2012.09841): a PatchGAN with its own optimizer."""

    def __init__(self, c, device, autocast, scaler=config.UNSCALED):
        self.critic, self.scaler = PatchGAN(size=c.size).to(device).train(), scaler
        if device.type == "cuda" and config.world() > 1:       # torch has none for CPUs
            self.critic = nn.SyncBatchNorm.convert_sync_batchnorm(self.critic)
        # pix2pix's rate at most: the other networks' default, 1.5e-3, was not tried on a critic
        self.optimizer = torch.optim.Adam(self.critic.parameters(), min(c.lr, 2e-4), (0.5, 0.9))
        self.weight, self.autocast = c.gan, autocast
        # the authors sum their loss over 3 S S values and bound the ratio at 1e4; this loss is a
        # mean, so the same bound is 1e4 / (3 S S): 0.051 at 256 px
        self.bound = 1e4 / (3 * c.size ** 2)

    def generator_loss(self, y, reconstruction, last_layer):
        """What the decoder's output y (B, 3, S, S) adds to the loss; reconstruction: the other
        terms, whose gradient at the decoder's last layer sets the weight."""
        with self.autocast():
            g = -self.critic(y).float().mean()
        one = self.scaler.scale(torch.ones((), device=y.device))   # in float16 a large number
        return g * self.weight * adaptive_weight(reconstruction, g, last_layer, self.bound, one)

    def step(self, x, y):
        """One step of the discriminator on real x and decoded y (B, 3, S, S), hinge loss."""
        with self.autocast():
            real, fake = self.critic(x).float(), self.critic(y.detach()).float()
        hinge = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(hinge).backward()
        config.all_reduce_mean([p.grad for p in self.critic.parameters()])
        self.scaler.step(self.optimizer)

    def state_dict(self):
        return dict(critic=self.critic.state_dict(), optimizer=self.optimizer.state_dict())

    def load_state_dict(self, state):
        self.critic.load_state_dict(state["critic"])
        self.optimizer.load_state_dict(state["optimizer"])


def adaptive_weight(reconstruction, g, last_layer, bound, scale=1.0):
    """|d reconstruction / dW| / |d g / dW| at the last layer W, at most `bound` (VQGAN, eq. 7), of
    the whole batch; `scale` keeps gradients in float16 from being rounded to zero."""
    gradients = [torch.autograd.grad(loss * scale, last_layer, retain_graph=True)[0] / scale
                 for loss in (reconstruction, g)]
    config.all_reduce_mean(gradients)
    a, b = (gradient.norm() for gradient in gradients)
    # where float16 overflows, so will the gradient of the sum: the scaler skips the step
    return (a / (b + 1e-4)).nan_to_num(0.0).clamp(0, bound).detach()
