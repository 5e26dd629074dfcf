"""Random views of images, for the perceptual loss of stage 1 on photographs."""
import math

import torch
import torch.nn.functional as F

from plumbing import config


def same_view(images, generator):
    """Several batches of images (B, 3, S, S), each image rotated by any angle, zoomed by 1/1.41 to
    1.41 and moved by up to S / 8 at random, mirrored at its edges; alike in all the batches.

    The perceptual loss of photographs needs it.  Where a decoder cannot know fine detail, one fixed
    texture, seen as a grid of dots, costs less than none, because it raises the same features of
    the frozen network.  Under random rotation and zoom no single texture does; faint dots that
    remain disappear with a GAN (RESULTS.md, Photographs).
    """
    B = len(images[0])
    angle, zoom, *move = config.rank_rows(torch.rand, B, 4, generator=generator).T
    zoom, move = 2 ** (zoom - 0.5), torch.stack(move, 1) / 2 - 0.25      # (B,), (B, 2): half sides
    cos, sin = zoom * (2 * math.pi * angle).cos(), zoom * (2 * math.pi * angle).sin()
    turn = torch.stack([cos, -sin, sin, cos], 1).view(B, 2, 2)
    where = torch.cat([turn, move[..., None]], 2).to(images[0].device)                 # (B, 2, 3)
    grid = F.affine_grid(where, images[0].shape, align_corners=False)
    return [F.grid_sample(x.float(), grid, padding_mode="reflection", align_corners=False)
            for x in images]
