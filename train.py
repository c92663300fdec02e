from dataclasses import dataclass
from rollout import RolloutConfig
from reward import RewardConfig
@dataclass
class Config(RolloutConfig, RewardConfig):
    pass
PRESETS={"tiny":Config(topk=2,max_turn_tokens=48,max_obs_tokens=84,max_tokens=600,instructions="")}
