"""A differentiable physics engine in NVIDIA Warp, for training policies through simulators on the gradient
flow that suits physics.

    import torch, warp_sims as ws

    system = ws.CartPole(poles=4)
    policy = ws.MLP(system.state_size, (100, 100), system.control_size)
    out = ws.rollout(system, policy, system.initial_states(8), horizon=100, flow="combined", loss="final")
    out.loss.backward()

See `rollout` for gradients through a simulator, `gradient_pair` for micro-batches and several processes,
`System` and `TorchSystem` for systems of your own, `train` for the whole loop, and the command `warp-sims`.
"""

import sys as _sys
from pathlib import Path as _Path

# In a checkout the folders kernels/ and bridge/ stand beside this package; installed, they lie inside it.
if not (_Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(_Path(__file__).parents[1]))

if "torch" not in _sys.modules:  # which is told once how its threads wait
    from .bridge.runtime.waiting import choose as _choose

    _choose()

from . import systems
from .actor_critic.config import ActorCriticConfig
from .actor_critic.folder import load_actor
from .actor_critic.run import ActorCriticResult, train_actor_critic
from .checking.report import CheckReport
from .checking.run import check
from .environments import gymnasium_env
from .episodes import Resets
from .estimators import Anneal, Blend, PerSecond, project_conflicting
from .gradients import GradientPair, gradient_pair
from .kernels.flow import Flow
from .linearization import linearize
from .pictures.animation import animate
from .pictures.recording import record_rollout
from .policies.ensembles import Ensemble
from .policies.gaussian import GaussianPolicy
from .policies.networks import MLP, WaveCNN, explain
from .policies.observed import Observed
from .profiling.run import profile
from .rollouts import Rollout, empty_cache, rollout, simulate, step
from .systems import (
    Ant,
    BlockFunctions,
    CartPole,
    DeviceFunctions,
    GuidanceByRepulsion,
    HalfCheetah,
    Hopper,
    LinkedPendulum,
    MemoryFunctions,
    ParameterFunctions,
    Quadrotor,
    QuantumControl,
    Robot,
    System,
)
from .systems.foreign import ForeignSystem, JaxSystem, TapeSystem, TorchSystem
from .systems.repeated import repeat
from .training.runs import load_run
from .training.together import train_together
from .training.train import TrainConfig, TrainResult, train

__version__ = "0.1.0"

__all__ = [
    "MLP",
    "Observed",
    "Blend",
    "ActorCriticConfig",
    "ActorCriticResult",
    "Anneal",
    "Ant",
    "BlockFunctions",
    "CartPole",
    "CheckReport",
    "DeviceFunctions",
    "Ensemble",
    "Flow",
    "ForeignSystem",
    "GaussianPolicy",
    "GradientPair",
    "GuidanceByRepulsion",
    "HalfCheetah",
    "Hopper",
    "JaxSystem",
    "LinkedPendulum",
    "MemoryFunctions",
    "ParameterFunctions",
    "PerSecond",
    "Quadrotor",
    "QuantumControl",
    "Resets",
    "Robot",
    "Rollout",
    "System",
    "TapeSystem",
    "TorchSystem",
    "TrainConfig",
    "TrainResult",
    "WaveCNN",
    "empty_cache",
    "gymnasium_env",
    "animate",
    "check",
    "explain",
    "gradient_pair",
    "linearize",
    "load_actor",
    "load_run",
    "profile",
    "project_conflicting",
    "record_rollout",
    "repeat",
    "rollout",
    "simulate",
    "step",
    "systems",
    "train",
    "train_actor_critic",
    "train_together",
]
