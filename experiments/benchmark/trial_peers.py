"""RL^2 on bandits in plain PyTorch: a GRU, trials acted in one batch, PPO over whole trials.

The peer starts from our weights, is asked for the gradient of the same trials first, and is then
timed over whole outer steps: trials acted, advantages, epochs of minibatches, Adam. Needs PyTorch,
which the type checker's environment lacks.
"""

import jax
import numpy as np
import torch  # pyrefly: ignore[missing-import]
from torch import nn  # pyrefly: ignore[missing-import]
from torch.nn import functional as F  # pyrefly: ignore[missing-import]

from experiments.benchmark.peers import Peer
from experiments.benchmark.works import Rl2Setting
from meta_jax.core import PyTree
from meta_jax.reinforcement.ppo import Experience

_DEVICE = "cuda" if jax.default_backend() == "gpu" else "cpu"


class Policy(nn.Module):
    """A GRU with a head for the policy and one for the value; inputs as Duan et al. have them."""

    def __init__(self, arms: int, hidden_size: int) -> None:
        """All layers."""
        super().__init__()
        self.arms = arms
        self.gru = nn.GRU(arms + 2, hidden_size, batch_first=True)
        self.policy, self.value = nn.Linear(hidden_size, arms), nn.Linear(hidden_size, 1)

    def forward(
        self, x: torch.Tensor, h: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Inputs [trials, steps, arms + 2] -> logits, values [trials, steps], and the memory."""
        z, h = self.gru(x, h)
        return self.policy(z), self.value(z)[..., 0], h


def load(policy: Policy, params: PyTree) -> None:
    """Gives the policy our weights."""
    hidden = policy.gru.hidden_size
    weights = {k: np.asarray(v) for k, v in named_arrays(params).items()}
    weights["gru.bias_hh_l0"] = np.concatenate([np.zeros(2 * hidden), weights["gru.bias_hh_l0"]])
    state = {k: torch.tensor(np.array(v), dtype=torch.float32) for k, v in weights.items()}
    policy.load_state_dict(state)


def named_arrays(tree: PyTree) -> dict[str, np.ndarray]:
    """Our parameters, or our gradient, under PyTorch's names."""
    memory, found = tree["memory"], {}
    for name, layer in (("ih", memory["input"]), ("hh", memory["recurrent"])):
        found[f"gru.weight_{name}_l0"] = np.asarray(layer["kernel"]).T
        found[f"gru.bias_{name}_l0"] = np.asarray(layer["bias"])
    for name in ("policy", "value"):
        found[f"{name}.weight"] = np.asarray(tree[name]["kernel"]).T
        found[f"{name}.bias"] = np.asarray(tree[name]["bias"])
    return found


class Trials:
    """Trials [trials, steps] and what is learned from them."""

    def __init__(self, **parts: torch.Tensor) -> None:
        """Inputs, actions, log probabilities, advantages and value targets."""
        self.parts = parts

    def rows(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Some of the trials, their advantages standardised."""
        chosen = {name: part[rows] for name, part in self.parts.items()}
        a = chosen["advantage"]
        chosen["advantage"] = (a - a.mean()) / (a.std(unbiased=False) + 1e-8)
        return chosen


def ppo_loss(policy: Policy, setting: Rl2Setting, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The clipped surrogate, with the critic's error and the entropy."""
    logits, values, _ = policy(batch["x"])
    log_p = F.log_softmax(logits, -1)
    taken = log_p.gather(-1, batch["action"][..., None])[..., 0]
    ratio = (taken - batch["log_p"]).exp()
    clipped = ratio.clamp(1 - setting.clip, 1 + setting.clip)
    gain = torch.minimum(ratio * batch["advantage"], clipped * batch["advantage"]).mean()
    entropy = -(log_p.exp() * log_p).sum(-1).mean()
    error = (values - batch["target"]).square().mean()
    return setting.value_weight * error - gain - setting.entropy_weight * entropy


def act(policy: Policy, setting: Rl2Setting) -> Trials:
    """Lets the policy act in fresh bandits, one step of all trials at a time."""
    n, arms = setting.trials, setting.arms
    p = torch.rand(n, arms, device=_DEVICE)
    x = torch.zeros(n, 1, arms + 2, device=_DEVICE)
    x[..., -1] = 1  # every pull begins an episode
    h, steps = None, []
    with torch.no_grad():
        for _ in range(setting.pulls):
            logits, value, h = policy(x, h)
            log_p = F.log_softmax(logits[:, 0], -1)
            action = torch.multinomial(log_p.exp(), 1)
            reward = (torch.rand(n, 1, device=_DEVICE) < p.gather(1, action)).float()
            steps.append(
                (x[:, 0], action[:, 0], log_p.gather(1, action)[:, 0], value[:, 0], reward[:, 0])
            )
            one_hot = F.one_hot(action, arms).float()
            x = torch.cat([one_hot, reward[..., None], torch.ones_like(reward[..., None])], -1)
        xs, action, log_p, value, reward = (
            torch.stack(part, 1) for part in zip(*steps, strict=True)
        )
        advantage = _advantages(setting, reward, value)
    return Trials(x=xs, action=action, log_p=log_p, advantage=advantage, target=advantage + value)


def _advantages(setting: Rl2Setting, reward: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    found, after, next_value = [], torch.zeros_like(value[:, 0]), torch.zeros_like(value[:, 0])
    for t in reversed(range(reward.shape[1])):
        delta = reward[:, t] + setting.discount * next_value - value[:, t]
        after = delta + setting.discount * setting.gae_lambda * after
        next_value = value[:, t]
        found.append(after)
    return torch.stack(found[::-1], 1)


def peer(setting: Rl2Setting, params: PyTree) -> Peer:
    """The peer, with its own copy of our weights."""
    policy = Policy(setting.arms, setting.hidden_size)
    load(policy, params)
    policy.to(_DEVICE)
    adam = torch.optim.Adam(policy.parameters(), lr=1e-3)

    def gradient(experience: Experience) -> dict[str, np.ndarray]:
        everything = torch.arange(len(experience.advantage), device=_DEVICE)
        policy.zero_grad()
        ppo_loss(policy, setting, _as_trials(setting, experience).rows(everything)).backward()
        return {k: p.grad.cpu().numpy().copy() for k, p in policy.named_parameters()}

    def step() -> None:
        trials = act(policy, setting)
        for _ in range(setting.epochs):
            order = torch.randperm(setting.trials, device=_DEVICE)
            for rows in order.chunk(setting.minibatches):
                adam.zero_grad()
                ppo_loss(policy, setting, trials.rows(rows)).backward()
                adam.step()

    def wait() -> None:
        if _DEVICE == "cuda":
            torch.cuda.synchronize()

    return Peer(gradient, step, wait)


def _as_trials(setting: Rl2Setting, experience: Experience) -> Trials:
    """Our trials as PyTorch's tensors."""
    trajectory = experience.trajectory
    percept = trajectory.percept
    one_hot = np.eye(setting.arms + 1)[np.asarray(percept.action)][..., : setting.arms]
    rest = np.stack([np.asarray(percept.reward), np.asarray(percept.begins)], -1)

    def tensor(array: object, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor(np.array(array), dtype=dtype, device=_DEVICE)

    return Trials(
        x=tensor(np.concatenate([one_hot, rest], -1)),
        action=tensor(trajectory.action, torch.int64),
        log_p=tensor(trajectory.extras.log_probability),
        advantage=tensor(experience.advantage),
        target=tensor(experience.value_target),
    )
