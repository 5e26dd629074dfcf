"""Two baselines that align a model with the frozen encoder: VA-VAE its latent (`ae.py --align`),
REPA the DiT's hidden tokens (`dit.py --repa`)."""
import torch.nn as nn
import torch.nn.functional as F

# Letters: B batch, N tokens, D width of the encoder.


def alignment_loss(z, h, cosine_margin=0.5, distance_margin=0.25):
    """VA-VAE's two losses (arXiv 2501.01423, section 3.2): a latent token, mapped linearly to the
    encoder's width, should point where the encoder's token does; and any two tokens of an image
    should be as far apart in angle as the encoder's are.  No loss within the margins.

    z (B, N, D): sampled latent tokens, mapped; h (B, N, D): the encoder's.
    """
    z, h = F.normalize(z, dim=-1), F.normalize(h, dim=-1)
    pointwise = F.relu(1 - cosine_margin - (z * h).sum(-1)).mean()
    return pointwise + F.relu((z @ z.mT - h @ h.mT).abs() - distance_margin).mean()


class Repa(nn.Module):
    """REPA (arXiv 2410.06940): an MLP should find the frozen encoder's tokens of the clean image in
    the DiT's hidden tokens of the noisy latent.  It trains with the DiT; sampling does without."""

    def __init__(self, c, width):
        """c: a Config; width: the encoder's."""
        super().__init__()
        self.weight, self.block = c.repa, max(1, c.depth // 3)        # paper: the 8th block of 28
        wide = 2 * c.dim                                              # paper: 2048 at width 1152
        self.mlp = nn.Sequential(nn.Linear(c.dim, wide), nn.SiLU(), nn.Linear(wide, wide),
                                 nn.SiLU(), nn.Linear(wide, width))

    def forward(self, hidden, h):
        """The list from `DiT.forward` and the encoder's tokens (B, N, width) -> loss (B,)"""
        found = self.mlp(hidden[self.block - 1]).float()
        cosine = F.cosine_similarity(found, h, dim=-1).mean(1)
        self.cosine = cosine.detach().mean()                          # of the last call, for show
        return self.weight * (1 - cosine)
