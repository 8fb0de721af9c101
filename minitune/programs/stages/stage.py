"""Stage: one frozen struct for each thing that a program can do, with `check(abstract) -> abstract`
and `run(state) -> state`.

The union is the registry: TOML, `schema` and the contract tests pick a stage up from it.
"""

from minitune.programs.stages.adapt import Full, Load, LoraStage
from minitune.programs.stages.evaluate import Eval, Harness
from minitune.programs.stages.export import Export
from minitune.programs.stages.generate import Generate
from minitune.programs.stages.merge import Merge
from minitune.programs.stages.quantize import Qat, Quantize
from minitune.programs.stages.register import Register
from minitune.programs.stages.save import Save
from minitune.programs.stages.train import Train
from minitune.programs.stages.upload import Upload
from minitune.programs.stages.verify import Verify

Stage = (
    Load
    | LoraStage
    | Full
    | Quantize
    | Qat
    | Train
    | Merge
    | Eval
    | Harness
    | Generate
    | Save
    | Export
    | Verify
    | Upload
    | Register
)
