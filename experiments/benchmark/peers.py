"""The same training steps in PyTorch: TorchOpt, higher, torch.func.vmap and plain PyTorch.

Every peer starts from our weights, is asked for the gradient of the same episodes first, and is
then timed over whole steps: tasks drawn with NumPy, forward, backward, Adam. It is written the way
its own examples are, and computes where we do, on the CPU or on a GPU, there in TF32 as we do.
Needs what requirements-benchmark.txt lists, which the type checker's environment lacks.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import higher  # pyrefly: ignore[missing-import]
import jax
import numpy as np
import torch  # pyrefly: ignore[missing-import]
import torchopt  # pyrefly: ignore[missing-import]
from torch import nn  # pyrefly: ignore[missing-import]
from torch.func import functional_call  # pyrefly: ignore[missing-import]
from torch.nn import functional as F  # pyrefly: ignore[missing-import]

from experiments.benchmark.works import INNER_LEARNING_RATE, REPTILE_BATCH, Work
from meta_jax.core import Episode, PyTree
from meta_jax.data.dataset import Dataset
from meta_jax.data.episodes import EpisodeSpec

_DEVICE = "cuda" if jax.default_backend() == "gpu" else "cpu"

_IMAGE = (28, 28, 1)
Task = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # support x, y, query x, y


class Peer(NamedTuple):
    """One library at one work."""

    gradient: Callable[[Any], dict[str, np.ndarray]]  # of the mean loss over tasks
    step: Callable[[], None]  # one whole training step, begun
    wait: Callable[[], None]  # until the steps begun are done


class Conv4(nn.Module):
    """The network of MAML (strided, with a head) or of Prototypical Networks (pooled)."""

    def __init__(self, features: int, ways: int | None) -> None:
        """`ways` outputs of a strided network; None for a pooled network without a head."""
        super().__init__()
        strided = ways is not None
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for i in range(4):
            self.convs.append(
                nn.Conv2d(features if i else 1, features, 3, padding=1, stride=1 + strided)
            )
            # Only the Prototypical Networks keep running statistics.
            self.norms.append(nn.BatchNorm2d(features, track_running_stats=not strided))
        self.head = nn.Linear(features, ways) if strided else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [n, 1, 28, 28] -> logits [n, ways] or embeddings [n, features]."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
            if self.head is None:
                x = F.max_pool2d(x, 2)
        return x.flatten(1) if self.head is None else self.head(x.mean((2, 3)))


class Perceptron(nn.Module):
    """The sinusoid network of MAML: 1 -> 40 -> 40 -> 1."""

    def __init__(self) -> None:
        """All layers."""
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(1, 40), nn.Linear(40, 40)])
        self.head = nn.Linear(40, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, 1] -> [n, 1]."""
        for layer in self.layers:
            x = F.relu(layer(x))
        return self.head(x)


class Relation(nn.Module):
    """The encoder and the relation module of Relation Networks, as the authors' code has them."""

    def __init__(self, features: int) -> None:
        """For 28x28 pixels."""
        super().__init__()
        paddings, inputs = (0, 0, 1, 1, 1, 1), (1, *[features] * 3, 2 * features, features)
        self.convs = nn.ModuleList(
            nn.Conv2d(n, features, 3, padding=pad) for n, pad in zip(inputs, paddings, strict=True)
        )
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(features, track_running_stats=False) for _ in inputs
        )
        self.hidden, self.output = nn.Linear(features, 8), nn.Linear(8, 1)

    def _block(self, i: int, x: torch.Tensor, pool: bool) -> torch.Tensor:
        x = F.relu(self.norms[i](self.convs[i](x)))
        return F.max_pool2d(x, 2) if pool else x

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Images [n, 1, 28, 28] -> maps [n, features, 5, 5]."""
        for i in range(4):
            x = self._block(i, x, pool=i < 2)
        return x

    def compare(self, classes: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """Maps of the classes and of the queries -> relation scores [queries, classes]."""
        m, n = queries.shape[0], classes.shape[0]
        pairs = [
            classes[None].expand(m, *classes.shape),
            queries[:, None].expand(m, n, *queries.shape[1:]),
        ]
        x = torch.cat(pairs, 2).flatten(0, 1)
        for i in (4, 5):
            x = self._block(i, x, pool=True)
        return torch.sigmoid(self.output(F.relu(self.hidden(x.flatten(1))))).reshape(m, n)


# ---- Our arrays in PyTorch's layouts.


def named_arrays(work: Work, tree: PyTree) -> dict[str, np.ndarray]:
    """Our parameters, or our gradient, under PyTorch's names.

    A strided kernel is turned by half a turn, as `images` turns the images: our SAME padding puts
    the odd pixel at the end, PyTorch's `padding=1` at the beginning, and so both do the same work.
    """
    learner = tree.get("learner", tree)
    found: dict[str, np.ndarray] = {}

    def add_block(i: int, block: PyTree) -> None:
        kernel = np.asarray(block["conv"]["kernel"])
        kernel = kernel[::-1, ::-1] if _is_strided(work) else kernel
        found[f"convs.{i}.weight"] = kernel.transpose(3, 2, 0, 1)
        found[f"convs.{i}.bias"] = np.asarray(block["conv"]["bias"])
        found[f"norms.{i}.weight"] = np.asarray(block["normalisation"]["scale"])
        found[f"norms.{i}.bias"] = np.asarray(block["normalisation"]["offset"])

    def add_linear(name: str, layer: PyTree) -> None:
        found[f"{name}.weight"] = np.asarray(layer["kernel"]).T
        found[f"{name}.bias"] = np.asarray(layer["bias"])

    network, head = learner["network"], learner["head"]
    for i, name in enumerate(sorted(network)):
        if "conv" in network[name]:
            add_block(i, network[name])
        else:
            add_linear(f"layers.{i}", network[name])
    if work.method == "relation":
        for i in (1, 2):
            add_block(len(network) + i - 1, head[f"block{i}"])
        for name in ("hidden", "output"):
            add_linear(name, head[name])
    elif head:
        add_linear("head", head)
    return found


def _is_strided(work: Work) -> bool:
    return work.spec is not None and work.method in ("maml", "reptile")


def _module(work: Work, params: PyTree) -> nn.Module:
    if work.spec is None:
        module: nn.Module = Perceptron()
    elif work.method == "relation":
        module = Relation(64)
    else:
        module = Conv4(64, work.spec.ways if _is_strided(work) else None)
    arrays = {
        k: torch.tensor(np.ascontiguousarray(v)) for k, v in named_arrays(work, params).items()
    }
    missing, unexpected = module.load_state_dict(arrays, strict=False)
    if unexpected or any("running" not in n and "batches" not in n for n in missing):
        raise ValueError(f"our parameters do not fit the peer: {missing + unexpected}")
    return module.to(_DEVICE)


def _images(x: np.ndarray, turned: bool) -> torch.Tensor:
    x = x[:, ::-1, ::-1] if turned else x
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def tasks_of(work: Work, episodes: list[Episode]) -> list[Task]:
    """Our episodes as a peer sees them."""

    def batch(x: np.ndarray, y: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        if work.spec is None:
            return torch.tensor(x), torch.tensor(y)
        return _images(x, _is_strided(work)), torch.tensor(y.argmax(-1))

    return [_placed((*batch(*e.support[:2]), *batch(*e.query[:2]))) for e in episodes]


def _placed(task: Task) -> Task:
    return tuple(array.to(_DEVICE) for array in task)


# ---- Tasks, drawn with NumPy.


def _image_tasks(data: Dataset, spec: EpisodeSpec, batch: int, turned: bool) -> Iterator:
    # All classes have equally many examples.
    images = np.asarray(data.examples).reshape(len(data.counts), data.largest, *_IMAGE)
    if turned:
        images = np.ascontiguousarray(images[:, :, ::-1, ::-1])
    rng = np.random.default_rng(0)
    classes, examples = images.shape[:2]
    needed = spec.shots + spec.queries
    label = torch.arange(spec.ways)
    support_y = label.repeat_interleave(spec.shots)
    query_y = label.repeat_interleave(spec.queries)

    def draw() -> Task:
        if spec.rotations == "classes":
            drawn = rng.choice(4 * classes, spec.ways, replace=False)
            turns, drawn = drawn // classes, drawn % classes
        else:
            turns, drawn = rng.integers(0, 4, spec.ways), rng.choice(classes, spec.ways, False)
        chosen = rng.random((spec.ways, examples)).argsort(1)[:, :needed]
        x = images[drawn[:, None], chosen][..., 0]
        x = np.stack([np.rot90(x[i], turn, (1, 2)) for i, turn in enumerate(turns)])
        x = torch.from_numpy(x).to(torch.float32).div_(255)[:, :, None]
        return (
            x[:, : spec.shots].flatten(0, 1),
            support_y,
            x[:, spec.shots :].flatten(0, 1),
            query_y,
        )

    while True:
        yield [_placed(draw()) for _ in range(batch)]


def _shuffled(tasks: list[Task]) -> list[Task]:
    """Tasks with their support in random order, to be read in mini-batches."""
    orders = [torch.randperm(len(y), device=y.device) for _, y, _, _ in tasks]
    return [(x[o], y[o], *query) for (x, y, *query), o in zip(tasks, orders, strict=True)]


def _sinusoid_tasks(batch: int) -> Iterator:
    rng = np.random.default_rng(0)
    while True:
        amplitude = rng.uniform(0.1, 5, (batch, 1, 1))
        phase = rng.uniform(0, np.pi, (batch, 1, 1))
        x = rng.uniform(-5, 5, (batch, 20, 1))
        y = amplitude * np.sin(x - phase)
        x, y = torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)
        yield [_placed((a[:10], b[:10], a[10:], b[10:])) for a, b in zip(x, y, strict=True)]


# ---- The libraries. Each accumulates the gradient of a task batch into `module`'s parameters.


def _plain_autograd(module: nn.Module, work: Work, loss: Callable, rate: float) -> Callable:
    """One task after the other, with `create_graph`: what learn2learn's clones do."""

    def backward(tasks: list[Task]) -> None:
        for x, y, query_x, query_y in tasks:
            params = dict(module.named_parameters())
            for _ in range(work.inner_steps):
                value = loss(functional_call(module, params, (x,)), y)
                gradient = torch.autograd.grad(
                    value, list(params.values()), create_graph=not work.first_order
                )
                params = {
                    k: p - rate * g for (k, p), g in zip(params.items(), gradient, strict=True)
                }
            value = loss(functional_call(module, params, (query_x,)), query_y)
            (value / len(tasks)).backward()

    return backward


def _torch_func_vmap(module: nn.Module, work: Work, loss: Callable, rate: float) -> Callable:
    """All tasks at once, gradients taken by function transforms."""

    def at(params: dict, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return loss(functional_call(module, params, (x,)), y)

    def task(params: dict, x: torch.Tensor, y: torch.Tensor, *query: torch.Tensor) -> torch.Tensor:
        for _ in range(work.inner_steps):
            gradient = torch.func.grad(at)(params, x, y)
            if work.first_order:
                gradient = {k: g.detach() for k, g in gradient.items()}
            params = {k: p - rate * gradient[k] for k, p in params.items()}
        return at(params, *query)

    def mean(params: dict, *batch: torch.Tensor) -> torch.Tensor:
        return torch.func.vmap(task, (None, 0, 0, 0, 0))(params, *batch).mean()

    def backward(tasks: list[Task]) -> None:
        params = {k: p.detach() for k, p in module.named_parameters()}
        gradient = torch.func.grad(mean)(params, *map(torch.stack, zip(*tasks, strict=True)))
        for name, p in module.named_parameters():
            p.grad = gradient[name]

    return backward


def _torchopt(module: nn.Module, work: Work, loss: Callable, rate: float) -> Callable:
    """TorchOpt's differentiable optimizer, as in its few-shot example."""
    inner = torchopt.MetaSGD(module, lr=rate)

    def backward(tasks: list[Task]) -> None:
        weights = torchopt.extract_state_dict(module, by="reference")
        state = torchopt.extract_state_dict(inner, by="reference")
        for x, y, query_x, query_y in tasks:
            for _ in range(work.inner_steps):
                inner.step(loss(module(x), y))
            (loss(module(query_x), query_y) / len(tasks)).backward()
            torchopt.recover_state_dict(module, weights)
            torchopt.recover_state_dict(inner, state)

    return backward


def _higher(module: nn.Module, work: Work, loss: Callable, rate: float) -> Callable:
    """higher's inner loop context, as in its MAML example."""
    inner = torch.optim.SGD(module.parameters(), lr=rate)

    def detached(gradient: list) -> list:
        return [g.detach() for g in gradient]

    def backward(tasks: list[Task]) -> None:
        for x, y, query_x, query_y in tasks:
            with higher.innerloop_ctx(module, inner, copy_initial_weights=False) as (fast, step):
                for _ in range(work.inner_steps):
                    callback = detached if work.first_order else None
                    step.step(loss(fast(x), y), grad_callback=callback)
                (loss(fast(query_x), query_y) / len(tasks)).backward()

    return backward


def _reptile(module: nn.Module, work: Work, loss: Callable, rate: float) -> Callable:
    """Steps of Adam with beta_1 = 0 on the module itself, then back; the gradient is the way."""

    def backward(tasks: list[Task]) -> None:
        start = {k: p.detach().clone() for k, p in module.named_parameters()}
        way = {k: torch.zeros_like(p) for k, p in start.items()}
        for x, y, _, _ in tasks:
            adam = torch.optim.Adam(module.parameters(), lr=rate, betas=(0.0, 0.999))
            for i in range(work.inner_steps):
                rows = slice(i * REPTILE_BATCH, (i + 1) * REPTILE_BATCH)
                adam.zero_grad()
                loss(module(x[rows]), y[rows]).backward()
                adam.step()
            with torch.no_grad():
                for name, p in module.named_parameters():
                    way[name] += (start[name] - p) / len(tasks)
                    p.copy_(start[name])
        for name, p in module.named_parameters():
            p.grad = way[name]

    return backward


def _relation(module: nn.Module, work: Work, layout: torch.memory_format) -> Callable:
    spec = _spec(work)
    module.to(memory_format=layout)

    def backward(tasks: list[Task]) -> None:
        for x, y, query_x, query_y in tasks:
            support = module.encode(x.contiguous(memory_format=layout))
            queries = module.encode(query_x.contiguous(memory_format=layout))
            # The examples come in any order; one product with the labels sorts them out.
            one_hot = F.one_hot(y, spec.ways).to(support.dtype)
            classes = (one_hot.T @ support.flatten(1)).unflatten(1, support.shape[1:])
            scores = module.compare(classes, queries)
            same = F.one_hot(query_y, spec.ways).to(scores.dtype)
            (F.mse_loss(scores, same) / len(tasks)).backward()

    return backward


def _spec(work: Work) -> EpisodeSpec:
    assert work.spec is not None, "sinusoids have no classes"
    return work.spec


def _prototypical(module: nn.Module, work: Work, layout: torch.memory_format) -> Callable:
    spec = _spec(work)
    module.to(memory_format=layout)

    def backward(tasks: list[Task]) -> None:
        for x, y, query_x, query_y in tasks:
            z = module(torch.cat([x, query_x]).contiguous(memory_format=layout))
            n = x.shape[0]
            # The examples come in any order; one product with the labels sorts them out.
            one_hot = F.one_hot(y, spec.ways).to(z.dtype)
            prototypes = one_hot.T @ z[:n] / spec.shots
            logits = -(z[n:, None] - prototypes).square().sum(-1)
            (F.cross_entropy(logits, query_y) / len(tasks)).backward()

    return backward


def peers(work: Work, params: PyTree) -> dict[str, Peer]:
    """All peers of a work by name, each with its own copy of our weights."""
    if work.spec is None:
        loss, rate = F.mse_loss, INNER_LEARNING_RATE["sinusoid"]
    else:
        loss, rate = F.cross_entropy, INNER_LEARNING_RATE["images"]
    if work.method == "reptile":
        module, rate = _module(work, params), INNER_LEARNING_RATE["reptile"]
        return {"torch": _peer(work, module, _reptile(module, work, loss, rate))}
    if work.method == "maml":
        builders = {
            "torch_autograd": _plain_autograd,
            "torch_func_vmap": _torch_func_vmap,
            "higher": _higher,
        }
        if not work.first_order:  # TorchOpt has the second order alone.
            builders["torchopt"] = _torchopt
        made = {k: (_module(work, params), build) for k, build in builders.items()}
        return {k: _peer(work, m, build(m, work, loss, rate)) for k, (m, build) in made.items()}
    build, found = {"prototypical": _prototypical, "relation": _relation}[work.method], {}
    for name, layout in (
        ("torch_channels_last", torch.channels_last),
        ("torch", torch.contiguous_format),
    ):
        module = _module(work, params)
        found[name] = _peer(work, module, build(module, work, layout))
    return found


def _peer(work: Work, module: nn.Module, backward: Callable[[list[Task]], None]) -> Peer:
    adam = torch.optim.Adam(module.parameters(), lr=1e-3)
    if work.spec is None:
        source = _sinusoid_tasks(work.task_batch)
    else:
        source = _image_tasks(work.tasks.data, work.spec, work.task_batch, turned=_is_strided(work))
        if work.method == "reptile":
            source = map(_shuffled, source)

    def gradient(tasks: list[Task]) -> dict[str, np.ndarray]:
        module.zero_grad()
        _use_tf32(False)
        backward(tasks)
        _use_tf32(True)
        return {k: p.grad.cpu().numpy().copy() for k, p in module.named_parameters()}

    def step() -> None:
        adam.zero_grad()
        backward(next(source))
        adam.step()

    def wait() -> None:
        if _DEVICE == "cuda":
            torch.cuda.synchronize()

    return Peer(gradient, step, wait)


def _use_tf32(allowed: bool) -> None:
    """On a GPU; a CPU has none."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
