"""What a program can do: one frozen struct a stage, each with `check(draft) -> draft` and `run(world) -> world`.

The union is the registry: TOML, `schema` and the contract tests pick a stage up from it.
"""

from minitune.stages.adapt import Full, Load, LoraStage, Merge, Qat, Quantize
from minitune.stages.measure import Eval, Generate, Harness
from minitune.stages.train import Train
from minitune.stages.write import Export, Save

Stage = Load | LoraStage | Full | Quantize | Qat | Train | Merge | Eval | Harness | Generate | Save | Export
