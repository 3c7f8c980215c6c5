"""Makes maml_torch.npz: a MAML meta-gradient by PyTorch's double backward, in double precision.

    python tests/golden/maml_torch.py

It needs torch and numpy alone. Two inner steps of SGD on one episode, all but batch norm adapted,
for the pooled and the strided Conv4 with batch statistics. Tensors have meta_jax's layouts: images
[n, height, width, channels], kernels [3, 3, inputs, features] and [inputs, outputs].
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

WAYS, SIDE, FEATURES, STEPS, RATE = 5, 28, 8, 2, 0.4
ADAPTED = ("conv.kernel", "conv.bias", "head.kernel", "head.bias")


def make_inputs(generator):
    inputs = {}
    for name, n in (("support", WAYS), ("query", 2 * WAYS)):
        inputs[f"{name}.x"] = generator.normal(size=(n, SIDE, SIDE, 1))
        inputs[f"{name}.y"] = np.eye(WAYS)[generator.permutation(n) % WAYS]
    channels = 1
    for i in range(1, 5):
        scale = (9 * channels) ** -0.5
        inputs[f"block{i}.conv.kernel"] = scale * generator.normal(size=(3, 3, channels, FEATURES))
        inputs[f"block{i}.conv.bias"] = 0.1 * generator.normal(size=FEATURES)
        # Of both signs: pooling before normalising must mind them.
        inputs[f"block{i}.batch_norm.scale"] = generator.normal(size=FEATURES)
        inputs[f"block{i}.batch_norm.offset"] = 0.1 * generator.normal(size=FEATURES)
        channels = FEATURES
    inputs["head.kernel"] = 0.3 * generator.normal(size=(FEATURES, WAYS))
    inputs["head.bias"] = 0.1 * generator.normal(size=WAYS)
    # What single precision holds, so that the file is small and exact.
    return {name: array.astype(np.float32) for name, array in inputs.items()}


def forward(p, x, pooled):
    x = x.permute(0, 3, 1, 2)
    for i in range(1, 5):
        kernel = p[f"block{i}.conv.kernel"].permute(3, 2, 0, 1)
        if pooled:
            x = F.conv2d(x, kernel, p[f"block{i}.conv.bias"], padding=1)
        else:  # SAME with stride 2: an even side is padded below and on the right alone
            pad = (0, 1, 0, 1) if x.shape[-1] % 2 == 0 else (1, 1, 1, 1)
            x = F.conv2d(F.pad(x, pad), kernel, p[f"block{i}.conv.bias"], stride=2)
        weight, bias = p[f"block{i}.batch_norm.scale"], p[f"block{i}.batch_norm.offset"]
        x = F.relu(F.batch_norm(x, None, None, weight, bias, training=True, eps=1e-5))
        x = F.max_pool2d(x, 2) if pooled else x
    z = x.flatten(1) if pooled else x.mean((2, 3))
    return z @ p["head.kernel"] + p["head.bias"]


def cross_entropy(logits, y):
    return -(y * torch.log_softmax(logits, 1)).sum(1).mean()


def meta_gradient(inputs, pooled):
    tensors = {name: torch.tensor(array, dtype=torch.float64) for name, array in inputs.items()}
    data = {name: tensors.pop(name) for name in list(tensors) if name[-2:] in (".x", ".y")}
    start = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    p = dict(start)
    adapted = [name for name in p if name.endswith(ADAPTED)]
    for _ in range(STEPS):
        loss = cross_entropy(forward(p, data["support.x"], pooled), data["support.y"])
        gradients = torch.autograd.grad(loss, [p[name] for name in adapted], create_graph=True)
        p.update({name: p[name] - RATE * g for name, g in zip(adapted, gradients, strict=True)})
    loss = cross_entropy(forward(p, data["query.x"], pooled), data["query.y"])
    gradients = torch.autograd.grad(loss, list(start.values()))
    found = {name: g.numpy().astype(np.float32) for name, g in zip(start, gradients, strict=True)}
    return {"loss": np.float64(loss.item()), **found}


def main():
    inputs = make_inputs(np.random.default_rng(0))
    arrays = {f"input/{name}": array for name, array in inputs.items()}
    for form in ("conv4", "strided_conv4"):
        found = meta_gradient(inputs, form == "conv4")
        arrays |= {f"{form}/{name}": array for name, array in found.items()}
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **arrays)


if __name__ == "__main__":
    main()
