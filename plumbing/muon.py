"""Muon for the weight matrices of a network and AdamW for everything else, as one optimizer.

Muon (Keller Jordan et al., kellerjordan.github.io/posts/muon) replaces the momentum of a weight
matrix with the nearest orthogonal matrix, so that all its directions learn at the same rate, which
can save many steps.  torch.optim.Muon takes 2-D parameters only; here a convolution
(out, in, k, k) counts as a matrix (out, in k k), because most of a decoder's weights are in them.
"""
import torch


def orthogonalize(matrices, steps=3):
    """Matrices (B, m, n) -> the same with their singular values moved toward 1.

    Newton-Schulz iteration of an odd polynomial in bfloat16, as in the original, but three steps
    instead of five, for speed.  Matrices of equal shape are batched: one large product is faster
    than many small ones.
    """
    x = matrices.bfloat16()
    x = x.mT if matrices.shape[1] > matrices.shape[2] else x            # the short side first
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)                         # 3.44 x + b x
    return (x.mT if matrices.shape[1] > matrices.shape[2] else x).float()


class Muon(torch.optim.Optimizer):
    """matrices: parameters of two or more dimensions, the first for the output."""

    def __init__(self, matrices, lr, momentum=0.95, steps=3):
        super().__init__(matrices, dict(lr=lr, momentum=momentum, steps=steps))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}                                                   # shape -> parameters
            for p in group["params"]:
                alike.setdefault(p.flatten(1).shape, []).append(p)
            for shape, parameters in alike.items():
                grads = [p.grad for p in parameters]
                for p in parameters:
                    if not self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                momenta = [self.state[p]["momentum"] for p in parameters]
                torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
                ahead = torch._foreach_lerp(grads, momenta, group["momentum"])       # Nesterov
                updates = orthogonalize(torch.stack([g.flatten(1) for g in ahead]), group["steps"])
                # tall matrices get larger steps, so that outputs change equally in all layers
                size = group["lr"] * max(1, shape[0] / shape[1]) ** 0.5
                for p, update in zip(parameters, updates):
                    p.sub_(update.view_as(p), alpha=size)


class MuonAdamW:
    """Muon on `matrices` and AdamW on `others`, with the interface of one optimizer.  A group's
    `lr_scale` is its learning rate relative to the schedule's."""

    def __init__(self, matrices, others, lr, muon_lr, betas):
        self.parts = [Muon(matrices, muon_lr),
                      torch.optim.AdamW(others, lr, betas, weight_decay=0.0, fused=True)]
        self.param_groups[0]["lr_scale"] = muon_lr / lr

    @property
    def param_groups(self):
        """The groups of both parts; not stored, because loading a state replaces them."""
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self, set_to_none=True):
        for part in self.parts:
            part.zero_grad(set_to_none)

    def step(self):
        for part in self.parts:
            part.step()

    def state_dict(self):
        return {"muon": self.parts[0].state_dict(), "adamw": self.parts[1].state_dict()}

    def load_state_dict(self, state):
        for part, name in zip(self.parts, ("muon", "adamw")):
            part.load_state_dict(state[name])


def optimizer(parameters, matrices, lr, muon_lr, betas):
    """-> MuonAdamW with Muon on `matrices`, a subset of the parameters; AdamW if muon_lr is 0."""
    if not muon_lr:
        return torch.optim.AdamW(parameters, lr, betas, weight_decay=0.0, fused=True)
    ours = {id(p) for p in matrices}
    return MuonAdamW(matrices, [p for p in parameters if id(p) not in ours], lr, muon_lr, betas)
