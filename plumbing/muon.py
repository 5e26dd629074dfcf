"""Muon for the weight matrices of a network and AdamW for everything else, as one optimizer.

Muon (Keller Jordan et al., kellerjordan.github.io/posts/muon) replaces the momentum of a weight
matrix by the nearest orthogonal matrix, so that every direction of it learns at the same rate; few
steps then do the work of many.  torch.optim.Muon takes 2-D parameters only; here a convolution
(out, in, k, k) counts as a matrix (out, in k k), because most of a decoder's weights are in them.
"""
import torch


def orthogonalize(matrices, steps=5):
    """Matrices (B, m, n) -> the same with all singular values near 1 (between about .7 and 1.2).

    Newton-Schulz iteration of an odd polynomial, in bfloat16 as in the original; equal shapes come
    together because one large product is faster than many small ones.
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
    """matrices: parameters of two or more dimensions, the first of which is the output's."""

    def __init__(self, matrices, lr, momentum=0.95, steps=5):
        super().__init__(matrices, dict(lr=lr, momentum=momentum, steps=steps))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}                                                   # shape -> parameters
            for p in group["params"]:
                alike.setdefault(p.flatten(1).shape, []).append(p)
            for shape, parameters in alike.items():
                grads = [p.grad for p in parameters]
                momenta = [self.state[p].setdefault("momentum", torch.zeros_like(p))
                           for p in parameters]
                torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
                ahead = torch._foreach_lerp(grads, momenta, group["momentum"])       # Nesterov
                updates = orthogonalize(torch.stack([g.flatten(1) for g in ahead]), group["steps"])
                # tall matrices get larger steps, so that outputs change alike in all layers
                size = group["lr"] * max(1, shape[0] / shape[1]) ** 0.5
                for p, update in zip(parameters, updates):
                    p.sub_(update.view_as(p), alpha=size)


class MuonAdamW:
    """Muon on `matrices` and AdamW on `others`, with the methods of one optimizer.  A group's
    `lr_scale` is its learning rate relative to the schedule's."""

    def __init__(self, matrices, others, lr, muon_lr, betas):
        self.parts = [Muon(matrices, muon_lr),
                      torch.optim.AdamW(others, lr, betas, weight_decay=0.0, fused=True)]
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        self.param_groups[0]["lr_scale"] = muon_lr / lr

    def zero_grad(self, set_to_none=True):
        for part in self.parts:
            part.zero_grad(set_to_none)

    def step(self):
        for part in self.parts:
            part.step()

    def state_dict(self):
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states):
        for part, state in zip(self.parts, states):
            part.load_state_dict(state)
