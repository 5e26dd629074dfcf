"""The adversarial loss of VQGAN (arXiv 2012.09841), which stage 1 uses at full size: a PatchGAN
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

    def __init__(self, c, device, autocast):
        self.critic = PatchGAN(size=c.size).to(device).train()
        self.optimizer = torch.optim.Adam(self.critic.parameters(), c.lr, (0.5, 0.9))
        self.weight, self.autocast = c.gan, autocast
        # the authors sum their loss over 3 S S values and bound the ratio at 1e4; this loss is a
        # mean, so the same bound is 1e4 / (3 S S): 0.051 at 256 px
        self.bound = 1e4 / (3 * c.size ** 2)

    def generator_loss(self, y, reconstruction, last_layer):
        """What the decoder's output y (B, 3, S, S) adds to the loss; reconstruction: the other
        terms, whose gradient at the decoder's last layer sets the weight."""
        with self.autocast():
            g = -self.critic(y).float().mean()
        return g * self.weight * adaptive_weight(reconstruction, g, last_layer, self.bound)

    def step(self, x, y):
        """One step of the discriminator on real x and decoded y (B, 3, S, S), hinge loss."""
        with self.autocast():
            real, fake = self.critic(x).float(), self.critic(y.detach()).float()
        hinge = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        self.optimizer.zero_grad(set_to_none=True)
        hinge.backward()
        config.all_reduce_mean([p.grad for p in self.critic.parameters()])
        self.optimizer.step()

    def state_dict(self):
        return dict(critic=self.critic.state_dict(), optimizer=self.optimizer.state_dict())

    def load_state_dict(self, state):
        self.critic.load_state_dict(state["critic"])
        self.optimizer.load_state_dict(state["optimizer"])


def adaptive_weight(reconstruction, g, last_layer, bound):
    """|d reconstruction / dW| / |d g / dW| at the last layer W, at most `bound` (VQGAN, eq. 7)"""
    a = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)[0].norm()
    b = torch.autograd.grad(g, last_layer, retain_graph=True)[0].norm()
    return (a / (b + 1e-4)).clamp(0, bound).detach()
