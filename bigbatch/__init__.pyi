# The public names and where they are defined. Read by type checkers, and by __init__.py.
from bigbatch import noise as noise
from bigbatch.commands.critical.measure import critical as critical
from bigbatch.commands.report.write import write_report
from bigbatch.commands.saved import export as export
from bigbatch.data.source import Data as Data
from bigbatch.engine.layers import whole as whole
from bigbatch.engine.optimizer import Adam as Adam
from bigbatch.engine.optimizer import AdamW as AdamW
from bigbatch.engine.optimizer import Lamb as Lamb
from bigbatch.engine.optimizer import Lars as Lars
from bigbatch.engine.optimizer import Momentum as Momentum
from bigbatch.engine.optimizer import Nesterov as Nesterov
from bigbatch.engine.optimizer import Sgd as Sgd
from bigbatch.engine.task import Task as Task
from bigbatch.layout.layout import Layout as Layout
from bigbatch.layout.layout import make_layout as make_layout
from bigbatch.models.classification import cross_entropy_sums as cross_entropy_sums
from bigbatch.models.ghost_norm import GhostNorm as GhostNorm
from bigbatch.schedule.adaptive.controller import Controller as Controller
from bigbatch.schedule.adaptive.controller import Decisions as Decisions
from bigbatch.schedule.plan import Plan as Plan
from bigbatch.schedule.plan import make_plan as make_plan
from bigbatch.schedule.policy import POLICIES as POLICIES
from bigbatch.schedule.policy import Policy as Policy
from bigbatch.schedule.policy import batch_ramp as batch_ramp
from bigbatch.schedule.policy import batch_stages as batch_stages
from bigbatch.schedule.policy import constant as constant
from bigbatch.schedule.policy import cosine as cosine
from bigbatch.schedule.policy import exponential as exponential
from bigbatch.schedule.policy import from_optax as from_optax
from bigbatch.schedule.policy import polynomial as polynomial
from bigbatch.schedule.policy import stages as stages
from bigbatch.schedule.policy import step_decay as step_decay
from bigbatch.schedule.policy import warmup as warmup
from bigbatch.schedule.policy import warmup_stable_decay as warmup_stable_decay
from bigbatch.schedule.transform import TRANSFORMATIONS as TRANSFORMATIONS
from bigbatch.schedule.transform import adam as adam
from bigbatch.schedule.transform import doubling_only as doubling_only
from bigbatch.schedule.transform import grow_batch as grow_batch
from bigbatch.schedule.transform import raise_momentum as raise_momentum
from bigbatch.schedule.transform import scale as scale
from bigbatch.schedule.transform import with_rule as with_rule
from bigbatch.training.evaluate import evaluate as evaluate
from bigbatch.training.loop import train as train
from bigbatch.training.prepare import prepare as prepare
from bigbatch.training.run import Run as Run
from bigbatch.training.updates import fit as fit

adaptive = Controller
report = write_report
__version__: str
